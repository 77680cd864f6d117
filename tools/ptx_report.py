"""What every CUDA kernel takes on every architecture: registers, spills, shared memory.

    python tools/ptx_report.py [--archs "80-real;90a-real"] [--jobs 1] [--markdown FILE]
    python tools/ptx_report.py --module [FILE] [--archs "80;90a"] [--brief]

The first compiles the sources: the package's own CMake build with warnings as errors, so that the
flags are those that ship. It needs nvcc, cmake, ninja and pybind11, but no GPU. The second reads a
module that is built already (by default the installed distaya_ext._C) with cuobjdump and nvdisasm,
in seconds; there any stack counts as a spill, loads from and stores to local memory are counted in
the machine code of --archs, and the kernels of tools/hot_kernels.py must hold what is promised.

Exit code 1: a kernel spills (--hot REGEX: only those whose name it finds are judged), a compiler
warned or failed, or a promised instruction is missing. 2: something needed is not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # appended, not inserted: an installed distaya_ext must win

from tools import cubin, hot_kernels  # noqa: E402
from tools.cubin import Missing, Use  # noqa: E402

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# ptxas only mentions it when it runs asynchronous products (wgmma) one after the other.
LOSS = r"\bwarning\b|potential performance loss"


def default_archs() -> str:
    """The real (machine code) architectures that CMakeLists.txt ships."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES\s+(\d[^)]*)\)", text)
    assert found, "CMakeLists.txt no longer lists its architectures"
    return ";".join(a for a in found[1].split() if a.endswith("-real"))


def compile_all(build: Path, archs: str, jobs: int) -> tuple[int, str]:
    """Build only the CUDA objects. Returns ninja's exit code and everything it printed."""
    import pybind11

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


def compiled(archs: str, jobs: int) -> tuple[list[Use], list[str]]:
    """Every kernel of the sources, and the compilers' warnings. RuntimeError: they failed."""
    for tool in ("nvcc", "cmake", "ninja", "c++filt"):
        if not shutil.which(tool):
            raise Missing(f"{tool} is needed but was not found; --module reads a built module")
    with TemporaryDirectory() as folder:  # fresh: a kernel that is not compiled reports nothing
        status, log = compile_all(Path(folder), archs, jobs)
    uses = parse(log)
    if status or not uses:
        raise RuntimeError(log)
    names = cubin.plain_names(use.kernel for use in uses)
    for use in uses:
        use.kernel = names[use.kernel]
    return uses, [line for line in log.splitlines() if re.search(LOSS, line, re.I)]


def installed() -> Path:
    """The compiled module of the distaya_ext that this Python would import."""
    spec = importlib.util.find_spec("distaya_ext")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("_C*.so"))]
    if not found:
        raise Missing("distaya_ext is not installed with its compiled module; name one: --module F")
    return found[0]


def rows(uses: list[Use], spills: str) -> tuple[list[str], list[list[str]]]:
    """One line per kernel: registers and static shared bytes on each architecture, behind a + what
    it spills there, then the worst of stack and spills."""
    archs = list(dict.fromkeys(u.arch for u in uses))
    head = ["kernel: registers / shared B", *archs, "stack B", spills]
    body = []
    for kernel in sorted({u.kernel for u in uses}):
        mine = {u.arch: u for u in uses if u.kernel == kernel}
        cells = [
            f"{u.registers}/{u.shared}{f' +{u.spilled}' * bool(u.spilled)}" if u else "-"
            for u in map(mine.get, archs)
        ]
        worst = [max(getattr(u, what) for u in mine.values()) for what in ("stack", "spilled")]
        body.append([kernel, *cells, *map(str, worst)])
    return head, body


def show(head: list[str], body: list[list[str]]) -> None:
    """Print the table, as wide as its longest kernel name."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    for line in (head, *body):
        cells = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        print(line[0].ljust(widths[0]), *cells, sep="  ")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", nargs="?", const="", metavar="FILE", help="read, not compile")
    parser.add_argument("--archs", help="to compile, or to disassemble; all without it")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    parser.add_argument("--hot", default="", metavar="REGEX", help="judge spills of these alone")
    parser.add_argument("--brief", action="store_true", help="leave the table out")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> list[str]:
    """Print everything asked for. Returns what is wrong, one sentence each."""
    if args.module is None:
        uses, wrong = compiled(args.archs or default_archs(), args.jobs)
        unit = "spilled B"
        said = [f"{len(wrong)} warnings"]
    else:
        wanted = [f"sm_{a.removesuffix('-real').removeprefix('sm_')}"
                  for a in (args.archs or "").split(";") if a]  # fmt: skip
        uses, code = cubin.read(Path(args.module) if args.module else installed(), wanted)
        unit = "local ld/st"
        said, wrong = hot_kernels.check(code)
    head, body = rows(uses, unit)
    if not args.brief:
        show(head, body)
    if args.markdown:
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
        args.markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    spilled = [u for u in uses if re.search(args.hot, u.kernel) and (u.spilled or
               (args.module is not None and u.stack))]  # fmt: skip
    print(*said, sep="\n")
    kernels, archs = len({u.kernel for u in uses}), len({u.arch for u in uses})
    print(f"{kernels} kernels, {archs} architectures: {len(spilled)} spill")
    return wrong + [
        f"{u.kernel} on {u.arch} spills: {u.spilled} {unit}, stack of {u.stack} B" for u in spilled
    ]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        wrong = report(arguments(argv))
    except Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    except RuntimeError as failed:
        print(failed, file=sys.stderr)
        return 1
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
