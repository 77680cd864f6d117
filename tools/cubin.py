"""What the kernels inside a built module are like, read with NVIDIA's cuobjdump and nvdisasm.

Neither needs a GPU or compiles anything. Both come with the CUDA toolkit or from PyPI
(nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). Names are those of ``plain_names``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ARCH = re.compile(r"^arch = (sm_\w+)$|^\s*code for (sm_\w+)$")
FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\w+):?\s*$")
USED = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
# An address, perhaps a predicate, then the opcode; its encoding in the next comment is of no use.
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# nvcc's name of a file's anonymous namespace: two checksums around the file's name.
FILE = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}")


class Missing(Exception):
    """Something that is needed is not there; the message is one sentence."""


@dataclass
class Use:
    """What one kernel takes on one architecture. Bytes are per thread, but `shared` per block.

    shared: static alone; what a launch asks for on top is not in the file. spilled: bytes of spill
    stores and loads as ptxas reports them, or from a module the number of instructions that touch
    local memory.
    """

    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0


Instructions = dict[tuple[str, str], Counter[str]]  # (kernel, arch) -> how often each opcode


def find(tool: str) -> str:
    """The path of a CUDA tool: from PATH, else from a wheel of PyPI. Missing where neither is."""
    if known := shutil.which(tool):
        return known
    for folder in sys.path:
        for path in sorted(Path(folder or ".").glob(f"nvidia/*/bin/{tool}")):
            if os.access(path, os.X_OK):
                return str(path)
    raise Missing(f"{tool} was not found; pip install nvidia-cuda-{tool}")


def dump(module: Path, *options: str) -> Iterable[str]:
    """Lines of cuobjdump, as they come: the disassembly of all architectures is long."""
    tool, env = (
        find("cuobjdump"),
        os.environ | {"NVDISASM_PATH": str(Path(find("nvdisasm")).parent)},
    )
    command = [tool, *options, str(module)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=env) as process:  # fmt: skip
        assert process.stdout and process.stderr
        yield from process.stdout
        said = process.stderr.read().strip()
    if process.returncode and "does not contain device code" not in said:
        raise Missing(f"cuobjdump failed: {said.splitlines()[-1] if said else 'no word of why'}")


def architectures(lines: Iterable[str]) -> list[str]:
    """sm_80, sm_90a ... of `cuobjdump -lelf`, in the order of the file."""
    named = (re.search(r"\.(sm_\w+)\.cubin\s*$", line) for line in lines)
    return list(dict.fromkeys(match[1] for match in named if match))


def resources(lines: Iterable[str]) -> list[Use]:
    """Of `cuobjdump -res-usage`: an architecture, then kernels each with a line of figures."""
    uses: list[Use] = []
    arch = ""
    for line in lines:
        if found := ARCH.match(line):
            arch = found[1] or found[2]
        elif found := FUNCTION.match(line):
            uses.append(Use(found[1], arch))
        elif uses and (found := USED.search(line)):
            uses[-1].registers, uses[-1].stack, uses[-1].shared = map(int, found.groups())
    return uses


def instructions(lines: Iterable[str]) -> Instructions:
    """Of `cuobjdump -sass`: how often each opcode, with its suffixes, stands in each kernel."""
    found: Instructions = {}
    arch, counts = "", Counter[str]()
    for line in lines:
        if opcode := OPCODE.match(line):
            counts[opcode[1]] += 1
        elif function := FUNCTION.match(line):
            counts = found.setdefault((function[1], arch), Counter())
        elif target := ARCH.match(line):
            arch = target[1] or target[2]
    return found


def local(counts: Counter[str]) -> int:
    """How many of these instructions load from or store to local memory: spills, or an array that
    did not fit into registers."""
    return sum(n for op, n in counts.items() if op.split(".")[0] in ("LDL", "STL"))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Linker name -> C++ name without namespaces, arguments and the types of template numbers.

    What stands in an anonymous namespace begins with its file, "cholesky_cuda/panel_kernel": two
    files may use the same name.
    """
    linked = list(dict.fromkeys(names))
    if not shutil.which("c++filt"):
        raise Missing("c++filt is needed but was not found")
    run = subprocess.run(
        ["c++filt"], input="\n".join(linked), capture_output=True, text=True, check=True
    )
    plain = {}
    for name, text in zip(linked, run.stdout.splitlines(), strict=True):
        text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
        text = re.sub(r"\([\w: ]+\)(?=-?\d)", "", text)
        text = re.sub(r"\(.*", "", text)
        file = FILE.search(name)
        plain[name] = (f"{file[1]}/" if file else "") + re.sub(r"(?:\w+::)*(?=\w)", "", text)
    return plain


def read(module: Path, wanted: Iterable[str] = ()) -> tuple[list[Use], Instructions]:
    """Every kernel of a module with its resources; the instructions only of the architectures
    `wanted` (all without it), because disassembling takes seconds for each."""
    if not module.is_file():
        raise Missing(f"there is no file {module}")
    have = architectures(dump(module, "-lelf"))
    if not have:
        raise Missing(f"{module.name} holds no CUDA machine code: it was built for the CPU alone")
    wanted = list(wanted) or have
    if absent := [arch for arch in wanted if arch not in have]:
        raise Missing(f"{module.name} has kernels for {' '.join(have)}, not for {' '.join(absent)}")
    uses = resources(dump(module, "-res-usage"))
    for use in uses:
        use.arch = use.arch or have[0]  # a bare cubin has one and does not repeat its name
    code: Instructions = {}
    for arch in wanted:
        code |= instructions(dump(module, "-sass", "-arch", arch))
    names = plain_names([use.kernel for use in uses] + [kernel for kernel, _ in code])
    for use in uses:
        use.spilled = local(code.get((use.kernel, use.arch), Counter()))
        use.kernel = names[use.kernel]
    merged: Instructions = {}
    for (kernel, arch), counts in code.items():
        merged[names[kernel], arch] = counts
    return uses, merged
