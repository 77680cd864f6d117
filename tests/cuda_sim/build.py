"""Compiles the kernels' sources with g++ into a Python module that runs them in the simulator.

The module has the same doors and the same functions as ``distaya_ext._C``; every tensor it is given
counts as a tensor on the device. Results are kept by what they were made from, so that a second
build costs nothing: in ``$DISTAYA_CUDA_SIM_CACHE``, or the user's cache folder.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEEP_DAYS = 14
AT_ONCE = 2  # compilers at a time

COMMON = "-std=c++20 -fPIC -fvisibility=hidden -fno-gnu-unique -pthread -ffp-contract=off"
COMMON += " -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
COMMON += ' -DDISTAYA_CUDA=1 -DDISTAYA_CUDA_SIM=1 -DDISTAYA_CUDA_ARCHS="90a-simulated"'
# Kernels: every access of memory is announced (hooks.cpp). What would join or reorder accesses is
# off, and so is what takes a function's own variables for unreachable by others.
KERNEL = "-x c++ -O1 -g1 -fsanitize=thread,alignment --param tsan-instrument-func-entry-exit=0"
KERNEL += " -fno-tree-vectorize -fno-tree-slp-vectorize -fno-store-merging -fno-ipa-reference"
KERNEL += " -fno-math-errno -w"
DOOR, ENGINE = "-O1", "-O2"


class BuildError(RuntimeError):
    """The simulator cannot be built; the sentence says why."""


def cache_folder() -> Path:
    """Where builds are kept."""
    chosen = os.environ.get("DISTAYA_CUDA_SIM_CACHE")
    if chosen:
        return Path(chosen)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distaya-cuda-sim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        return Path(tempfile.gettempdir()) / f"distaya-cuda-sim-{os.getuid()}"
    return folder


def compiler() -> str:
    """g++, or a sentence on how to do without."""
    found = shutil.which("g++")
    if not found:
        raise BuildError(
            "the CUDA simulator needs g++, which is not on PATH; install it, or set "
            "DISTAYA_SKIP_CUDA_SIM=1 to leave its tests out"
        )
    return found


def include_flags() -> list[str]:
    """Folders of headers: ours, the stand-ins for CUDA's, pybind11's, Python's."""
    import pybind11

    folders = ["tests/cuda_sim/include", "tests/cuda_sim", "csrc"]
    system = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    return [f"-I{f}" for f in folders] + [x for f in system for x in ("-isystem", f)]


def sources() -> dict[str, str]:
    """Flags of every source of the module, by its path from the repository's root."""
    out = {}
    for path in sorted((ROOT / "csrc").rglob("*.cu")):
        out[str(path.relative_to(ROOT))] = KERNEL
    for path in sorted((ROOT / "csrc").rglob("*.cpp")):
        if not path.name.endswith("_cpu.cpp"):
            out[str(path.relative_to(ROOT))] = DOOR
    for path in sorted((HERE / "cuda_sim").glob("*.cpp")):
        out[str(path.relative_to(ROOT))] = ENGINE
    return out


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def _run(command: list[str], given: str | None = None) -> str:
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout


def with_gaps(assembly: str) -> str:
    """Leave 256 bytes behind every shared variable, and announce calls of memcpy and its like.

    Shared variables are the thread-local ones: their sections begin with .tbss.
    """
    lines, inside = [], False
    for line in assembly.splitlines():
        if line.startswith("\t.section"):
            inside = line.startswith(("\t.section\t.tbss", "\t.section\t.tdata"))
        elif line.startswith(("\t.text", "\t.data", "\t.bss")):
            inside = False
        lines.append(line)
        if inside and line.startswith("\t.zero\t"):
            lines.append("\t.zero\t256")
    text = "\n".join(lines) + "\n"
    return re.sub(r"\b(call|jmp)\tmem(cpy|move|set)@PLT", r"\1\tcuda_sim_mem\2@PLT", text)


class Builder:
    """One module: the repository's sources, some of them replaced by other text."""

    def __init__(self, replaced: dict[str, str] | None = None, extra: dict[str, str] | None = None):
        self.gxx = compiler()
        self.includes = include_flags()
        self.replaced = replaced or {}
        self.sources = extra or sources()
        self.cache = cache_folder()
        self.version = _run([self.gxx, "--version"])

    def key(self) -> str:
        """Of the whole module: everything any of its sources could include."""
        parts = [self.version, sys.version, str(self.includes), COMMON, repr(self.sources)]
        parts.append(Path(__file__).read_bytes())
        for folder in (ROOT / "csrc", HERE):
            for path in sorted(folder.rglob("*")):
                if path.suffix in {".h", ".cuh", ".cu", ".cpp"}:
                    parts += [str(path.relative_to(ROOT)), path.read_bytes()]
        return _digest([*parts, repr(sorted(self.replaced.items()))])

    def object(self, path: str, folder: Path) -> Path:
        """The compiled source, from the cache where its text after the preprocessor is known."""
        flags = [*COMMON.split(), *self.sources[path].split(), *self.includes]
        kernel = self.sources[path] == KERNEL
        name = path.replace("/", "_")
        source = path
        if path in self.replaced:
            source = str(folder / name)
            Path(source).write_text(f'#line 1 "{path}"\n{self.replaced[path]}')
        expanded = _run([self.gxx, *flags, "-E", source])
        out = self.cache / "objects" / (_digest([self.version, repr(flags), expanded]) + ".o")
        if out.exists():
            os.utime(out)
            return out
        made = folder / (name + ".o")
        if kernel:
            assembly = folder / (name + ".s")
            _run([self.gxx, *flags, "-S", source, "-o", str(assembly)])
            assembly.write_text(with_gaps(assembly.read_text()))
            _run([self.gxx, "-c", str(assembly), "-o", str(made)])
        else:
            _run([self.gxx, *flags, "-c", source, "-o", str(made)])
        os.replace(made, out)
        return out

    def stubs(self, objects: list[Path], folder: Path) -> Path:
        """Doors call CPU twins, which are not here: each becomes a function that says so."""
        defined, wanted = set(), set()
        for line in _run(["nm", *map(str, objects)]).splitlines():
            found = re.search(r"\b([A-Za-z]) (\S+)$", line)
            if found:
                (wanted if found[1] == "U" else defined).add(found[2])
        names = sorted(n for n in wanted - defined if re.match(r"_ZN?K?7distaya", n))
        text = '#include <stdexcept>\nextern "C" {\n'
        for name in names:
            text += f'void {name}() {{ throw std::runtime_error("{name} is not simulated"); }}\n'
        source, out = folder / "stubs.cpp", folder / "stubs.o"
        source.write_text(text + "}\n")
        _run([self.gxx, *COMMON.split(), "-fvisibility=default", "-c", str(source), "-o", str(out)])
        return out

    def module(self) -> Path:
        """The path of the built module."""
        folder = self.cache / "modules" / self.key()
        out = folder / "_C.so"
        for part in (self.cache / "objects", folder):
            part.mkdir(parents=True, exist_ok=True)
        with open(self.cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits, then finds what it needs
            if not out.exists():
                self.link(folder, out)
            os.utime(folder)
            prune(self.cache, folder)
        return out

    def link(self, folder: Path, out: Path) -> None:
        work = folder / f"work-{os.getpid()}"
        work.mkdir(exist_ok=True)
        # The largest first, so that the last one does not run alone for long.
        order = sorted(self.sources, key=lambda p: (p.endswith("module.cpp"), _weight(p)))[::-1]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            objects = list(pool.map(lambda p: self.object(p, work), order))
        objects.append(self.stubs(objects, work))
        made = work / "module.so"
        _run([self.gxx, "-shared", "-pthread", *map(str, objects), "-ldl", "-o", str(made)])
        os.replace(made, out)
        shutil.rmtree(work)


def _weight(path: str) -> int:
    return (ROOT / path).stat().st_size * (10 if "sqgemm" in path and path.endswith(".cu") else 1)


def prune(cache: Path, but: Path) -> None:
    """Forget what nobody used for two weeks."""
    oldest = time.time() - KEEP_DAYS * 86400
    for path in [*(cache / "objects").iterdir(), *(cache / "modules").iterdir()]:
        if path != but and path.stat().st_mtime < oldest:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def build(replaced: dict[str, str] | None = None) -> Path:
    """The module's path, built if need be. replaced: other text for some sources, by their path."""
    return Builder(replaced).module()


def build_with(*names: str) -> Path:
    """A library of these kernels of this folder, with the engine and without the package."""
    chosen = {str((HERE / name).relative_to(ROOT)): KERNEL for name in names}
    engine = {path: flags for path, flags in sources().items() if flags == ENGINE}
    return Builder(extra=chosen | engine).module()


if __name__ == "__main__":
    begin = time.time()
    print(build(), f"{time.time() - begin:.1f} s")
