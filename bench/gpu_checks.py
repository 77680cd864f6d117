"""The sections of bench/gpu.py that judge and do not time: the GPU tests and compute-sanitizer.

They may run beside each other, and the four tools of compute-sanitizer always do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu_report import Section
from bench.gpu_sections import ROOT, child, ending, tool

# As `pytest` would be called by name: the working folder must not hide an installed package.
PYTEST = "import sys; sys.path = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"
WORKERS = 4  # of pytest, where xdist is installed
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # the exit code by which compute-sanitizer says that it found something


def gpu_test_files(folder: Path = ROOT / "tests") -> list[str]:
    """The files with GPU tests: to import the other ones takes longer than some of the tests."""
    files = sorted(folder.glob("test_*.py"))
    return [str(f) for f in files if "pytest.mark.cuda" in f.read_text(encoding="utf-8")]


def tests(section: Section, limit: float, env: dict[str, str]) -> None:
    """pytest -m cuda, from the installed package; keeps the closing line, what failed, and what
    took longest."""
    options = ["-m", "cuda", "-q", "--durations=5", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(WORKERS)]
        env = env | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (2 * WORKERS)))}
    command = [sys.executable, "-c", PYTEST, *options, *gpu_test_files()]
    code, lines = child(command, limit, env, show=False)
    section.said = lines[-1].strip("= ") if code in (0, 1) and lines else ending(code, limit, lines)
    if code != 0:
        section.status = "failed"
        failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR "))]
        section.said = "; ".join([section.said, *failed[:20]])
    slow = [re.match(r"([\d.]+s) (?:call|setup)\s+(\S+)", line) for line in lines]
    if longest := [f"{s[2].split('/')[-1]} {s[1]}" for s in slow if s]:
        section.said += f"; slowest: {', '.join(longest)}"
    print(f"  tests: {section.said}", flush=True)


def sanitizer() -> str | None:
    """compute-sanitizer of the CUDA toolkit (also beside nvcc), or of PyPI's wheel."""
    places = [tool("compute-sanitizer")]
    if nvcc := tool("nvcc"):
        places.append(str(Path(nvcc).resolve().parent / "compute-sanitizer"))
    for folder in sys.path:
        wheels = Path(folder or ".").glob("nvidia/*/bin/compute-sanitizer")
        places += [str(path) for path in sorted(wheels)]
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def sanitize(section: Section, limit: float, env: dict[str, str]) -> None:
    """The four tools over bench/gpu_sanitize.py, beside each other; on our kernels alone."""
    program = sanitizer()
    if program is None:
        section.status = "failed"
        section.said = (
            "compute-sanitizer was not found; it comes with the CUDA toolkit or with "
            "pip install nvidia-cuda-sanitizer-api-cu12"
        )
        return
    # Without torch's cache every tensor is an allocation of its own, and its ends are watched.
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}

    def run(tool: str) -> str:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
        command += ["--launch-timeout", "120"]
        if tool == "memcheck":  # torch asks the driver for much that it may not have
            command += ["--report-api-errors", "no"]
        if tool != "initcheck":  # which must see what torch's kernels wrote
            command += ["--kernel-name", "kernel_substring=distaya"]
        command += [sys.executable, str(ROOT / "bench" / "gpu_sanitize.py")]
        return verdict(tool, *child(command, limit, env, show=False), limit)

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        said = list(pool.map(run, TOOLS))
    section.said = "; ".join(said)
    if any(not text.endswith(" clean") for text in said):
        section.status = "failed"
    print(f"  sanitize: {section.said}", flush=True)


def verdict(tool: str, code: int | None, lines: list[str], limit: float) -> str:
    """What a tool came to: its summary and the first thing that it found."""
    told = [line.removeprefix("=========").strip() for line in lines if line.startswith("=====")]
    summary = next((line for line in reversed(told) if "SUMMARY" in line), "")
    found = re.search(r"(\d+) (?:errors?|hazards?)", summary)
    if code == 0 and found and int(found[1]) == 0:
        return f"{tool} clean"
    if code == FOUND or (found and int(found[1])):
        first = next((line for line in told if line and not line.startswith("COMPUTE-")), "")
        return f"{tool} found: {first[:200]} ({summary})"
    own = [line for line in lines if not line.startswith("=====")]
    why = ending(code, limit, own) if code != 0 else "it said nothing that can be read"
    return f"{tool} failed: {why}"
