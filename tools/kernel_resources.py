"""Compile every CUDA kernel for every architecture and print what each one takes.

    python tools/kernel_resources.py [--archs "80-real;90a-real"] [--jobs 1] [--markdown FILE]

Uses the package's own CMake build with warnings as errors, so the flags are those that ship. Needs
nvcc, cmake, ninja and pybind11, but no GPU. Exit code 1: a kernel spills registers to memory, or a
compiler warned or failed. Exit code 2: something needed is missing.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pybind11
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Use:
    """What one kernel takes on one architecture. Bytes are per thread, but `shared` per block."""

    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0


def default_archs() -> str:
    """The real (machine code) architectures that CMakeLists.txt ships."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES\s+(\d[^)]*)\)", text)
    assert found, "CMakeLists.txt no longer lists its architectures"
    return ";".join(a for a in found[1].split() if a.endswith("-real"))


def compile_all(build: Path, archs: str, jobs: int) -> tuple[int, str]:
    """Build only the CUDA objects. Returns ninja's exit code and everything it printed."""
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
        "-DDISTAYA_CUDA=ON", "-DDISTAYA_PTXAS_INFO=ON", "-DDISTAYA_WERROR=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={archs}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    run = subprocess.run(configure, capture_output=True, text=True)
    if run.returncode:
        return run.returncode, run.stdout + run.stderr
    ninja = ["ninja", "-C", str(build)]
    targets = subprocess.run(
        [*ninja, "-t", "targets", "all"], capture_output=True, text=True, check=True
    )
    objects = re.findall(r"^(\S+\.cu\.o):", targets.stdout, re.M)
    assert objects, "the build names no CUDA objects"
    run = subprocess.run(
        [*ninja, f"-j{jobs}", *objects], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return run.returncode, run.stdout


def parse(log: str) -> list[Use]:
    """Read ptxas' report: an entry line, then its frame and its resources."""
    uses: list[Use] = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            uses.append(Use(*entry.groups()))
        elif uses and (frame := FRAME.search(line)):
            stack, stores, loads = map(int, frame.groups())
            uses[-1].stack = max(uses[-1].stack, stack)
            uses[-1].spilled = max(uses[-1].spilled, stores + loads)
        elif uses and (used := USED.search(line)):
            uses[-1].registers = int(used[1])
            shared = SHARED.search(line)
            uses[-1].shared = int(shared[1]) if shared else 0
    return uses


def demangle(uses: list[Use]) -> None:
    """Replace linker names by C++ names, without namespaces and arguments."""
    names = "\n".join(u.kernel for u in uses)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    for use, name in zip(uses, plain.stdout.splitlines(), strict=True):
        name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # the type of a template's number
        name = re.sub(r"\(.*", "", name)
        use.kernel = re.sub(r"distaya::(?:cuda::)?", "", name)


def rows(uses: list[Use]) -> tuple[list[str], list[list[str]]]:
    """One line per kernel: registers on each architecture, then the worst of the rest."""
    archs = list(dict.fromkeys(u.arch for u in uses))
    head = ["kernel", *archs, "shared B", "stack B", "spilled B"]
    body = []
    for kernel in sorted({u.kernel for u in uses}):
        mine = [u for u in uses if u.kernel == kernel]
        registers = {u.arch: str(u.registers) for u in mine}
        worst = [max(getattr(u, what) for u in mine) for what in ("shared", "stack", "spilled")]
        body.append([kernel, *(registers.get(a, "-") for a in archs), *map(str, worst)])
    return head, body


def show(head: list[str], body: list[list[str]]) -> None:
    """Print the table, wide enough for its longest kernel name."""
    table = Table(title="Registers per thread by architecture, and bytes", title_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
    for line in body:
        table.add_row(*line, style="red" if line[-1] != "0" else "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(
    archs: Annotated[str, typer.Option(help="CMake's list, separated by ;")] = default_archs(),
    jobs: Annotated[int, typer.Option(min=1, help="Compilers at a time.")] = 1,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here.")] = None,
) -> None:
    """Compile every CUDA kernel for every architecture and print what each one takes."""
    for tool in ("nvcc", "cmake", "ninja", "c++filt"):
        if not shutil.which(tool):
            print(f"{tool} is needed but was not found", file=sys.stderr)
            raise typer.Exit(2)
    with TemporaryDirectory() as folder:  # fresh: a kernel that is not compiled reports nothing
        status, log = compile_all(Path(folder), archs, jobs)
    uses = parse(log)
    warnings = [line for line in log.splitlines() if re.search(r"\bwarning\b", line, re.I)]
    if status or not uses:
        print(log, file=sys.stderr)
        raise typer.Exit(1)
    demangle(uses)
    head, body = rows(uses)
    show(head, body)
    if markdown:
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    spilled = [u for u in uses if u.spilled]
    for u in spilled:
        print(f"{u.kernel} spills {u.spilled} bytes on {u.arch}", file=sys.stderr)
    print(*warnings, sep="\n", end="\n" if warnings else "", file=sys.stderr)
    kernels = len({u.kernel for u in uses})
    print(f"{kernels} kernels, {len(head) - 4} architectures: {len(spilled)} spill, "
          f"{len(warnings)} warnings")  # fmt: skip
    raise typer.Exit(1 if spilled or warnings else 0)


if __name__ == "__main__":
    typer.run(main)
