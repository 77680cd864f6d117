"""compress under the real launcher: one voice, a killed rank, and what goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
from forked import hashes

ASSETS = Path(str(resources.files("distaya_ext") / "assets"))
COMPRESS = [
    "compress",
    ASSETS / "nano-aya",
    "--calib",
    ASSETS / "texts/calibration",
    "--sparsity",
    "2:4",
]
COMPRESS += ["--window", 64, "--tokens", 8192]
FREE = "--rdzv-endpoint=localhost:0", "--rdzv-backend=c10d"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", *FREE, "--nproc-per-node"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in words], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def rank(launcher: subprocess.Popen[str], number: int) -> psutil.Process:
    """The process of a rank."""
    found = psutil.Process(launcher.pid).children(recursive=True)
    return next(p for p in found if p.environ().get("RANK") == str(number))


def when_kept(launcher: subprocess.Popen[str], out: Path, layers: int) -> None:
    """Until so many layers of a run are kept."""
    journal, deadline = out.parent / f".{out.name}.compress" / "journal.jsonl", time.time() + 240
    while time.time() < deadline:
        if journal.exists() and journal.read_text().count('"kind": "layer"') >= layers:
            return
        if launcher.poll() is not None:
            break
        time.sleep(0.02)
    launcher.kill()
    raise AssertionError(f"no {layers} layers were kept: {launcher.communicate()}")


def test_a_killed_rank_ends_the_run_and_it_goes_on_with_another_number(tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    launcher = start(*LAUNCH, 2, "-m", "distaya_ext", *COMPRESS, "--out", out)
    when_kept(launcher, out, 1)
    victim = rank(launcher, 1)
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    said = launcher.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 30
    assert launcher.returncode != 0 and not out.exists()
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, said
    assert f"rank 1 of 2 (process {victim.pid} on " in errors[0] and "killed or lost" in errors[0]
    assert "layers; the same command goes on from there" in errors[0]
    three = start(*LAUNCH, 3, "-m", "distaya_ext", *COMPRESS, "--out", out)
    shown, said = three.communicate(timeout=240)
    assert three.returncode == 0, said
    assert shown == f"{out}\n"  # one rank speaks
    assert "going on" in said or "kept" in said
    one = start(sys.executable, "-m", "distaya_ext", *COMPRESS, "--parts", 2, "--out", whole)
    said = one.communicate(timeout=240)[1]
    assert one.returncode == 0, said
    found, expected = hashes(out), hashes(whole)
    del found["results.json"], expected["results.json"]  # tell of their processes
    assert found == expected and any(name.endswith(".safetensors") for name in found)
    told = json.loads((out / "results.json").read_text())
    assert told["calibration"]["parts"] == 2 and len(told["ranks"]) == 3
    assert min(each["windows"] for each in told["ranks"]) == 0  # of two parts one has none
