"""How bench/gpu.py runs its sections: one process each, with a limit, whatever becomes of it."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from bench.gpu_report import Report, Section

ROOT = Path(__file__).resolve().parent.parent
ENDING = 10  # seconds that the whole model's script needs to start and to clean up


def environment(built: bool) -> dict[str, str]:
    """The children's. After --build the source tree must not hide the package just installed."""
    env = dict(os.environ)
    env.setdefault("OMP_WAIT_POLICY", "passive")
    if built and "PYTHONPATH" in env:
        paths = env["PYTHONPATH"].split(os.pathsep)
        kept = [p for p in paths if p and Path(p).resolve() != ROOT]
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return env


def child(
    command: Sequence[str], limit: float, env: dict[str, str], *, show: bool = True
) -> tuple[int | None, list[str]]:
    """Run a command in a session of its own: (exit code, None when killed after `limit` s; lines).

    show: its output appears as it comes and only errors are returned; otherwise both, unseen.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        out = None if show else log
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(max(0.1, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return code, [line.rstrip() for line in log if line.strip()]


def ending(code: int | None, limit: float, lines: list[str]) -> str:
    """How a child failed, as a sentence: its last line, or the signal that ended it."""
    if code is None:
        return f"stopped at {limit:.0f} s, all the time that the other sections leave it"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    last = lines[-1].replace(str(ROOT), ".").replace(sys.prefix, "(python)") if lines else ""
    return f"exit code {code}: {last[:300] or 'no word of why'}"


def records(text: str) -> list[dict]:
    """The JSON lines of a measuring process, or one JSON value: a row, a list of them, {"rows"}."""
    found = []
    try:
        whole = json.loads(text)
        found = whole if isinstance(whole, list) else whole.get("rows", [whole])
    except json.JSONDecodeError:
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off in the middle of a word
                found.append(json.loads(line))
    known = {"row", "ceilings", "facts", "error"}
    return [r if known & set(r) and "name" not in r else {"row": r} for r in found]


def measured(
    section: Section,
    limit: float,
    env: dict[str, str],
    command: Sequence[str],
    report: Report,
    *,
    all_of_it: bool = False,
) -> None:
    """Run one measuring process and take over what it wrote, also when it broke off midway.

    It is told when its budget ends, so that it makes fewer repeats. all_of_it: it is told instead
    how many seconds there are, and may use them all.
    """
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "rows"
        ends = ["--until", str(time.time() + min(limit, section.budget))]
        if all_of_it:
            ends = ["--limit", f"{max(1.0, limit - ENDING):.0f}"]
        code, lines = child([*command, *ends, "--into", str(into)], limit, env)
        text = into.read_text(encoding="utf-8") if into.exists() else ""
    for record in records(text):
        if "row" in record:
            section.rows.append(record["row"])
        report.ceilings.update(record.get("ceilings", {}))
        report.facts.update(record.get("facts", {}))
        section.said = record.get("error", section.said)
    if code == 0:
        return
    section.status = "failed"
    explained = section.said or any("error" in row for row in section.rows)
    if code is None or code < 0 or not explained:
        section.said = f"{ending(code, limit, lines)} (rows measured: {len(section.rows)})"


def measuring(section: str, device: str, quick: bool) -> list[str]:
    """The command that measures a section (or finds the facts)."""
    script = str(ROOT / "bench" / "gpu_measure.py")
    return [sys.executable, script, section, "--device", device, *(["--quick"] if quick else [])]


def whole(device: str, quick: bool) -> list[str]:
    """The command that compresses a whole model of Aya-8B's shape."""
    script = str(ROOT / "bench" / "gpu_whole.py")
    return [sys.executable, script, "--device", device, *(["--quick"] if quick else [])]


def lacking(build: bool) -> list[str]:
    """What pyproject.toml asks for and this Python has not, as requirements.

    build: also what a build without isolation needs. Asked first, because a build takes minutes and
    the package cannot be imported without what it depends on.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(dependencies|requires) = \[(.*?)\]", text, re.M | re.S)
    asked = [r for name, body in lists if build or name == "dependencies"
             for r in re.findall(r'"(.+?)"', body)]  # fmt: skip
    return [requirement for requirement in asked if not has(requirement)]


def has(requirement: str) -> bool:
    """Whether such a distribution is installed; versions are left to those who install."""
    try:
        metadata.distribution(re.split(r"[^\w.-]", requirement)[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, of CUDA_HOME, or where toolkits are installed."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    homes += sorted(glob.glob("/usr/local/cuda-*"), reverse=True)
    places = [os.path.join(home, "bin", name) for home in homes if home]
    return shutil.which(name) or next((p for p in places if os.access(p, os.X_OK)), None)


def device_arch() -> str:
    """The present GPU as CMake names it, e.g. 90a-real."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}{'a' if (major, minor) in ((9, 0), (10, 0)) else ''}-real"


def cause(lines: list[str]) -> list[str]:
    """The first error of cmake or a compiler as one line; pip's own come last and say nothing."""
    for i, line in enumerate(lines):
        if re.search(r"CMake Error|\berror\b.*:", line) and "subprocess" not in line:
            return [" ".join(part.strip() for part in lines[i : i + 2])]
    return lines


def build(section: Section, limit: float, arch: str) -> None:
    """pip install of this tree for one architecture, in a build folder of its own.

    cmake's cache would keep an earlier build's architectures, and that it had found no nvcc: hence
    one folder per architecture, and nvcc by name.
    """
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    pip += ["--force-reinstall"]  # the version number may not have changed
    pip += [f"--config-settings=build-dir=build/gpu-{arch}"]
    if nvcc := tool("nvcc"):
        pip += [f"--config-settings=cmake.define.CMAKE_CUDA_COMPILER={nvcc}"]
    pip += ["."]
    env = environment(True) | {"CUDAARCHS": arch, "DISTAYA_CUDA": "ON"}
    code, lines = child(pip, limit, env, show=False)
    section.said = f"for {arch}"
    if code != 0:
        section.status, section.said = "failed", ending(code, limit, cause(lines))
