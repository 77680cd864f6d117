"""Ranks that fail, are killed, hang or never come: all others end soon, with one sentence."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranked import Ranks, run_ranks

import distaya_ext
from distaya_ext.errors import InputError, UsageError, add_note, notes
from distaya_ext.ranks import joined, same_folder, team, watch
from distaya_ext.ranks.board import Board
from distaya_ext.ranks.greeting import notices, refuse_others
from distaya_ext.ranks.process import Process

SOON = 30.0  # seconds; what is promised
_FAST = {"DISTAYA_RANK_SILENCE": "3"}


def _end(function, *args) -> tuple:
    """(kind, sentence, exit code, whether another rank tells it, notes, seconds) of a run's end."""
    start = time.monotonic()
    try:
        with joined():
            function(*args)
    except BaseException as error:
        code = getattr(error, "exit_code", getattr(error, "code", None))
        spent = time.monotonic() - start
        return type(error).__name__, str(error), code, error.quiet, notes(error), spent
    return "", "", 0, False, [], time.monotonic() - start


def _ends(world: int, function, *args, **variables: str) -> list:
    """By rank; None of one that was killed."""
    found = Ranks(world, _end, function, *args, join=False, **variables).ends(60)
    return [what if good else None for good, what in found]


def _compute() -> None:
    """What never asks whether the others are there."""
    x = torch.ones(64, 64)
    while True:
        x = (x @ x).clamp(max=1)


def _others(how: str) -> None:
    """What the other ranks do meanwhile."""
    if how == "compute":
        _compute()
    elif how == "sleep":
        time.sleep(120)
    else:
        team().gather("never all of us")


def _one_fails(who: int, how: str) -> None:
    team().wait()
    if team().rank == who:
        time.sleep(0.3)
        raise InputError("shard 3 cannot be read")
    try:
        _others(how)
    except BaseException as error:
        time.sleep(0.6)  # what cleans up is not interrupted again
        add_note(error, "kept: 3 of 8 layers")
        raise


@pytest.mark.parametrize("how", ["compute", "sleep", "collective"])
@pytest.mark.parametrize("who", [0, 1])
def test_what_fails_on_one_rank_ends_all_with_its_sentence(who, how):
    ends = _ends(2, _one_fails, who, how)
    mine, other = ends[who], ends[1 - who]
    assert mine[:3] == ("InputError", "shard 3 cannot be read", 3)
    assert other[0] == "LostError" and other[2] == 3
    assert other[1].startswith(f"rank {who} of 2 (") and "shard 3 cannot be read" in other[1]
    assert other[4] == ["kept: 3 of 8 layers"]
    assert [end[3] for end in ends] == [False, True]  # rank 0 tells it, whoever failed
    assert max(end[5] for end in ends) < SOON


def _all_fail(sentences: list[str]) -> None:
    raise UsageError(sentences[team().rank])


@pytest.mark.parametrize("sentences", [["bad recipe"] * 3, ["bad a", "bad b", "bad c"]])
def test_what_fails_on_all_ranks_is_told_once(sentences):
    ends = _ends(3, _all_fail, sentences)
    assert [end[2] for end in ends] == [2, 2, 2]
    assert [end[3] for end in ends] == [False, True, True]
    if len(set(sentences)) == 1:
        assert [end[:2] for end in ends] == [("UsageError", "bad recipe")] * 3
    else:  # one of them is it
        assert sum(end[0] == "UsageError" for end in ends) == 1


def _one_is_killed(who: int, how: str) -> None:
    us = team()
    us.wait()
    if us.rank == who:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    _others(how)


@pytest.mark.parametrize("how", ["compute", "collective"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_killed_is_named(who, how):
    """Also where it is the one that keeps the store."""
    ends = _ends(3, _one_is_killed, who, how)
    assert ends[who] is None
    left = [end for end in ends if end is not None]
    assert len(left) == 2
    for kind, sentence, code, _, _, seconds in left:
        assert kind == "LostError" and code == 7 and seconds < SOON
        assert f"rank {who} of 3 (process " in sentence and "killed or lost" in sentence
    assert [end[3] for end in left] == [False, True]


def _one_is_stopped() -> None:
    us = team()
    pids = us.gather(os.getpid())
    if us.rank == 0:
        os.kill(pids[1], signal.SIGSTOP)
        try:
            us.wait()
        finally:
            os.kill(pids[1], signal.SIGKILL)
    time.sleep(120)


def test_a_rank_that_hangs_is_named():
    (kind, sentence, code, quiet, _, seconds), stopped = _ends(2, _one_is_stopped, **_FAST)
    assert stopped is None
    assert (kind, code, quiet) == ("LostError", 7, False) and seconds < SOON
    assert "rank 1 of 2" in sentence and "no sign of life for 3 s" in sentence


def _everyone_is_stopped() -> None:
    """As a laptop that sleeps, or a scheduler, does: nobody is lost."""
    us = team()
    watch._PAUSED = 2.0
    pids = us.gather(os.getpid())
    if us.first:
        code = (
            f"import os, time\nfor s in (19, 18):\n for p in {pids}: os.kill(p, s)\n time.sleep(4)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, start_new_session=True)
    us.wait()


def test_ranks_that_were_all_stopped_for_a_while_go_on():
    for end in _ends(2, _everyone_is_stopped, **_FAST):
        assert end[0] == "", end[1]
        assert end[5] > 4


def _one_never_comes() -> None:
    if team().rank == 1:
        time.sleep(120)
    team().wait()


def test_a_collective_that_a_rank_never_comes_to_ends():
    ends = _ends(2, _one_never_comes, DISTAYA_RANK_TIMEOUT="3")
    for kind, sentence, code, _, _, seconds in ends:
        assert kind == "LostError" and code == 7 and seconds < SOON
        assert "rank 1 of 2 (process " in sentence and "has not come within 3 s" in sentence
    assert [end[3] for end in ends] == [False, True]


def test_a_rank_that_never_starts_is_named():
    variables = {"WORLD_SIZE": "3", "DISTAYA_RANK_TIMEOUT": "2"}
    ends = _ends(1, _compute, **variables)
    assert ends[0][:4] == ("LostError", ends[0][1], 7, False)
    assert ends[0][1] == "1 of 3 ranks came within 2 s; rank 1, rank 2 did not"


def _keeper() -> None:
    """Keeps the store for ranks that come, and is killed before they do."""
    board = Board(0, 2, 60.0, host=True)
    while board.missing() != [0]:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def _alone_with_a_keeper() -> tuple | None:
    if os.environ["RANK"] == "0":
        _keeper()
    return _end(_compute)


def test_the_end_of_the_store_while_ranks_come_together_is_told():
    gone, (_, end) = Ranks(2, _alone_with_a_keeper, join=False).ends(60)
    assert gone == (False, ("gone", -signal.SIGKILL, ""))
    assert end[:4] == (
        "LostError",
        "rank 0 of 2 or the torchrun beside it was killed or lost",
        7,
        False,
    )


def _told_to_stop(kills: bool) -> None:
    """As torchrun does it when it has seen a rank end, and when it was told itself."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    us = team()
    pids = us.gather(os.getpid())
    if us.rank == 1 and kills:
        os.kill(pids[0], signal.SIGTERM)
        os.kill(pids[1], signal.SIGKILL)
    if not kills:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(120)


def test_who_is_told_to_stop_since_another_was_killed_says_so():
    (kind, sentence, code, quiet, *_), _ = _ends(2, _told_to_stop, True)
    assert (kind, code, quiet) == ("LostError", 7, False)
    assert "rank 1 of 2" in sentence and "killed or lost" in sentence


def test_who_is_told_to_stop_for_no_reason_ends_as_alone():
    for rank, end in enumerate(_ends(2, _told_to_stop, False)):
        assert (end[0], end[2], end[3]) == ("SystemExit", 143, rank > 0)
        assert end[5] < SOON


def _interrupted_while_busy() -> None:
    """Ctrl-C on all; what rank 0 does about it takes longer than the news that rank 1 has ended."""
    us = team()
    us.wait()
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        time.sleep(4 if us.first else 0)
        add_note(error, "kept: 3 of 8 layers")
        raise


def test_who_cleans_up_for_a_reason_of_its_own_is_not_interrupted():
    for rank, end in enumerate(_ends(2, _interrupted_while_busy)):
        assert (end[0], end[3], end[4]) == ("KeyboardInterrupt", rank > 0, ["kept: 3 of 8 layers"])


def _deep_in_a_library(told: Path) -> None:
    """Rank 0 hears no signal."""
    us = team()
    us.wait()
    if us.rank == 1:
        raise InputError("shard 3 cannot be read")
    watch.GRACE = 1.0
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    time.sleep(120)


def test_a_rank_that_cannot_be_interrupted_ends_all_the_same(tmp_path):
    found = Ranks(2, _end, _deep_in_a_library, tmp_path / "told", join=False).ends(60)
    assert found[0] == (False, ("gone", 3, ""))
    assert found[1][1][3]  # rank 0 has told it:
    told = (tmp_path / "told").read_text()
    assert told.startswith("Error: rank 1 of 2 (") and told.endswith("shard 3 cannot be read\n")


def _another_version() -> tuple:
    if os.environ["RANK"] == "1":
        distaya_ext.__version__ = "9.9"
    return _end(_compute)


def test_ranks_of_different_versions_are_refused():
    ends = run_ranks(2, _another_version, join=False)
    for kind, sentence, code, *_ in ends:
        assert (kind, code) == ("UsageError", 2)
        assert "rank 1 of 2 (" in sentence
        assert sentence.endswith(f"distaya_ext is '9.9' and not '{distaya_ext.__version__}'")
    assert [end[3] for end in ends] == [False, True]


def _record(threads: int, cores: int = 8, place: str = "a", **made: object) -> dict:
    process = {"host": f"host-{place}", "place": place, "pid": 1, "start": "1"}
    made = {"torch": "2.10", "command line": ["eval"]} | made
    return {"process": process, "made of": made, "threads": threads, "cores": cores}


def test_all_that_is_different_is_named():
    same = [_record(1), _record(2, place="b")]
    refuse_others(same)
    other = _record(1, place="b", torch="2.11", **{"command line": ["eval", "--lines"]})
    with pytest.raises(UsageError) as told:
        refuse_others([*same, other])
    assert str(told.value) == (
        "rank 2 of 3 (host-b) cannot work with rank 0 (host-a): there torch is '2.11' and not "
        "'2.10'; command line is ['eval', '--lines'] and not ['eval']"
    )


def test_idle_cores_and_uneven_threads_are_told():
    assert notices([_record(4), _record(4)], "cpu") == []
    assert notices([_record(1)] * 2, "cuda") == []
    assert notices([_record(1), _record(1), _record(1, place="b")], "cpu") == [
        "2 ranks with 1 threads each run on 8 cores; OMP_NUM_THREADS=4 uses all of them"
    ]
    assert "8, 4 threads" in notices([_record(8), _record(4, place="b")], "cpu")[0]


def test_a_process_that_has_ended_is_gone():
    own = Process.own()
    assert not own.gone(own.place)
    assert replace(own, start=own.start + "1").gone(own.place)  # its id was given to another
    assert not replace(own, start=own.start + "1").gone("another machine")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{child.pid}/stat").read_text()
    start = stat.rpartition(")")[2].split()[19]
    known = replace(own, pid=child.pid, start=start)
    assert not known.gone(own.place)
    child.stdin.close()
    deadline = time.monotonic() + SOON
    while not known.gone(own.place):  # a zombie: nobody has waited for it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    child.wait()
    assert known.gone(own.place)


def _folders(folders: list[Path]) -> None:
    same_folder(folders[team().rank], patience=0.3)


def test_a_folder_that_not_all_ranks_see_is_refused(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    assert [end[0] for end in _ends(2, _folders, [here, here])] == ["", ""]
    for kind, sentence, code, *_ in _ends(2, _folders, [here, there]):
        assert (kind, code) == ("UsageError", 2)
        assert (
            sentence.startswith("rank 1 of 2 (") and "must be one that all ranks share" in sentence
        )
    assert set(tmp_path.rglob("*")) == {here, there}


@pytest.mark.parametrize("name", ["DISTAYA_RANK_TIMEOUT", "DISTAYA_RANK_SILENCE"])
@pytest.mark.parametrize("value", ["soon", "0", "nan", "inf", "-3"])
def test_seconds_that_are_none_are_refused(monkeypatch, name, value):
    told = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, text in (told | {name: value, "TORCHELASTIC_USE_AGENT_STORE": "False"}).items():
        monkeypatch.setenv(key, text)
    said = f"{name} must be seconds from 1 to 604800, not '{value}'"
    with pytest.raises(UsageError, match=said), joined():
        pass


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch, name):
    told = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, text in (told | {name: "x"}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(UsageError, match=f"{name} must be a whole number"), joined():
        pass
