"""torchrun itself: a run of several processes speaks, and fails, as one program does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranked import Ranks, free_port

from distaya_ext.cli.app import app
from distaya_ext.cli.ranked import RANKED, device_of
from distaya_ext.cli.remember import _never_fails
from distaya_ext.device import find_device
from distaya_ext.errors import UsageError
from distaya_ext.ops import machine
from distaya_ext.ranks import Team
from distaya_ext.ranks.join import take_gpu
from distaya_ext.ranks.team import acting

COMMAND = str(Path(__file__).with_name("torchrun_command.py"))
SOON = 30.0  # seconds; what is promised


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.Popen:
    # As torchrun, which is not on every PATH.
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
    port = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    return subprocess.Popen(
        [str(a) for a in (*run, *port, *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def errors(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith(("Error:", "Stopped", "Interr"))]


def test_a_command_that_fails_on_all_ranks_says_so_once(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.txt").write_text("words\n")
    words = ("eval", tmp_path / "none", "--texts", tmp_path / "texts", "--offline")
    run = torchrun("-m", "distaya_ext", *words)
    out, err = run.communicate(timeout=120)
    assert run.returncode != 0 and out == ""
    (said,) = errors(err)
    assert "none" in said


def _line(folder: Path, line: str) -> None:
    """A command line in this rank, which ends with it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), number)
    app(line.split(), prog_name="distaya")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("inspect nothing", 2, "Error: distaya inspect runs in one process; start it without"),
        ("plan nothing --quiet", 2, "Error: distaya plan runs in one process; start it without"),
        ("--debag", 2, "Error: No such option: --debag"),
        ("eval nothing --windw 3", 2, "Error: No such option: --windw"),
        ("--version", 0, "distaya "),
        ("compress --help", 0, "Usage: distaya compress"),
    ],
)
def test_one_rank_alone_speaks(tmp_path, line, code, said):
    ends = Ranks(2, _line, tmp_path, line, join=False).ends(60)
    codes = [what[1] if what[0] == "gone" else int(what[1]) for _, what in ends]
    assert codes == [code, code]
    told = [
        [(tmp_path / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in (0, 1)
    ]
    assert told[1] == ["", ""]
    assert " ".join(told[0][code != 0].split()).startswith(said)
    assert told[0][code == 0] == ""


def test_one_rank_alone_remembers(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTAYA_HISTORY", str(tmp_path / "history"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    remembered = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        _never_fails(remembered.append)(rank)
    assert remembered == ["0"]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("how", "what"),
    [("compute", "rank 1"), ("collective", "torchrun"), ("collective", "interrupted")],
)
def test_a_run_that_is_ended_says_why_and_what_is_kept(how, what):
    run = torchrun(COMMAND, "wait", how)
    pids = json.loads(run.stdout.readline())  # rank 0 alone prints
    start = time.monotonic()
    victim, number, said = {
        "rank 1": (pids[1], signal.SIGKILL, f"Error: rank 1 of 2 (process {pids[1]} on "),
        "torchrun": (run.pid, signal.SIGKILL, "Error: "),
        "interrupted": (run.pid, signal.SIGINT, "Interrupted; "),
    }[what]
    os.kill(victim, number)
    out, err = run.communicate(timeout=120)
    while not all(map(gone, pids)):
        assert time.monotonic() - start < SOON
        time.sleep(0.05)
    assert time.monotonic() - start < SOON
    assert run.returncode != 0 and out == ""
    assert len(errors(err)) == 1, err
    (told,) = errors(err)
    assert told.startswith(said) and "kept in" in told, err
    assert told.rstrip(".").endswith("kept in .out.compress: 3 of 8 layers")
    if what == "torchrun":
        assert "torchrun" in told and "killed or lost" in told


# ---- which commands, which devices ----


def test_commands_that_know_ranks_are_commands():
    assert {command.name for command in app.registered_commands} >= RANKED


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("eval m", "cpu"),
        ("eval m --device cuda", "cuda"),
        ("eval --device=cuda:1 m", "cuda:1"),
        ("eval --device cpu m --device cuda", "cuda"),
        ("eval m --device", "cpu"),
    ],
)
def test_the_device_of_a_command_line(line, device):
    assert device_of(line.split()) == device


@pytest.fixture
def four_gpus(monkeypatch) -> list:
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(machine, "cuda_status", lambda: {"status": "ok"})
    return taken


def test_cuda_is_the_gpu_of_the_rank(four_gpus):
    assert find_device("cuda") == torch.device("cuda")
    with acting(Team(rank=6, world=8, local_rank=2, local_world=4)):
        assert find_device("cuda") == torch.device("cuda:2")
        assert find_device("cuda:2") == torch.device("cuda:2")  # what it has found before
        with pytest.raises(UsageError, match="by 4 ranks of one host; with --device cuda each"):
            find_device("cuda:1")
    with acting(Team(rank=1, world=2)):
        assert find_device("cuda:3") == torch.device("cuda:3")  # alone on its host
        assert find_device("cuda") == torch.device("cuda:0")


def test_every_rank_of_a_host_takes_its_gpu(four_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert take_gpu("cuda") and four_gpus == [3]
    assert not take_gpu("cpu") and four_gpus == [3]
    with pytest.raises(UsageError, match="cuda:1 is asked for by 4 ranks of one host"):
        take_gpu("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(UsageError, match="5 ranks run on one host and torch sees 4 CUDA GPUs"):
        take_gpu("cuda")
