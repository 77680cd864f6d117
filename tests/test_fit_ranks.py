"""Training by several ranks: the bits of one process, and one end for all."""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import Scripted, data, spec, state, tiny_model
from fitting_ranks import UNEVEN, Told, hashes, off, plain, ragged
from ranked import Ranks, run_ranks

from distaya_ext.ranks import Parts, Team, team
from distaya_ext.ranks.team import acting
from distaya_ext.train import plot
from distaya_ext.train.dealing import deal
from distaya_ext.train.events import Evaluated, TrainStep
from distaya_ext.train.finetune import CrossEntropy
from distaya_ext.train.fit import fit
from distaya_ext.train.trainer import told_to_stop


def dropping() -> torch.nn.Module:
    model = tiny_model()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


def _uneven(root: Path, parts: int | None) -> dict[str, Any]:
    plot.plot_losses = lambda *_: []
    model, told = dropping(), []
    work = root / f"{team().world} of {parts}"
    asked = UNEVEN.model_copy(update={"parts": parts})
    course = fit(model, *ragged(), CrossEntropy(), asked, work, on_event=told.append)
    steps = [event for event in told if isinstance(event, TrainStep)]
    looks = [event for event in told if isinstance(event, Evaluated)]
    team().wait()
    return {
        "state": {name: tensor.numpy() for name, tensor in state(model).items()},
        "course": plain(course),
        "ranks": course.ranks,
        "told": len(steps) + len(looks),
        "files": hashes(work),
        "seconds": course.seconds,
    }


def test_parts_decide_the_bits_and_ranks_do_not(tmp_path):
    (one,) = run_ranks(1, _uneven, tmp_path, 3)
    for world, parts in ((3, None), (2, 3)):
        found = run_ranks(world, _uneven, tmp_path, parts)
        for rank, each in enumerate(found):
            assert each["ranks"] == world and each["course"] == one["course"]
            assert each["files"] == one["files"] and each["seconds"] == found[0]["seconds"]
            assert all((each["state"][n] == v).all() for n, v in one["state"].items())
            assert each["told"] == (4 + 3 if rank == 0 else 0)
    assert one["course"]["parts"] == 3
    (other,) = run_ranks(1, _uneven, tmp_path, 2)
    assert other["files"] != one["files"]  # or all of this could not fail


def test_more_parts_give_the_same_step_but_for_rounding(tmp_path):
    ends, start = [], state(tiny_model())
    for parts in (1, 3):
        model = tiny_model()
        asked = UNEVEN.model_copy(update={"parts": parts, "held_out": 0.0})
        fit(model, ragged()[0], None, CrossEntropy(), asked, tmp_path / str(parts))
        ends.append(state(model))
    assert off(ends[1], ends[0], start) < 1e-6  # AdamW makes much of the rounding


@pytest.mark.parametrize(("rows", "micro", "parts"), [(7, 2, 3), (8, 3, 1), (5, 9, 5), (9, 2, 2)])
def test_every_row_of_a_step_is_dealt_out_once(rows, micro, parts):
    found = deal(rows, micro, parts)
    assert [row for cut in found.micros for row in cut] == list(range(rows))
    assert len(found.cuts) == parts and all(found.cuts)
    assert max(map(len, found.micros)) <= micro
    if parts == 1:  # as one process always has cut them
        assert [cut.start for cut in found.micros] == list(range(0, rows, micro))
    for world in range(1, parts + 1):
        turns = []
        for rank in range(world):
            own = replace(found, parts=Parts.dealt(parts, Team(rank, world)))
            turns.append(own.turns(even=True))
            assert [turn for turn in turns[-1] if turn] == own.turns(even=False)
        assert len({len(each) for each in turns}) == 1
        numbers = [turn[1] for each in turns for turn in each if turn]
        assert numbers == list(range(len(found.micros)))


# ---- accidents ----


@dataclass
class OfARow(Scripted):
    """An accident where a step has row `row`: "nan", or SIGTERM to the process that has it."""

    row: int = 0
    what: str = "nan"

    def __call__(self, model, batch):
        found = super().__call__(model, batch)
        if torch.is_grad_enabled() and self.row in batch.rows.tolist():
            if self.what == "nan":
                return {**found, "loss": found["loss"] * torch.nan}
            os.kill(os.getpid(), signal.SIGTERM)
        return found


def _end(root: Path, what: str, row: int, name: str) -> tuple[str, str]:
    plot.plot_losses = lambda *_: []

    def told(number: int, frame: object) -> None:
        raise Told(number)

    signal.signal(signal.SIGTERM, told)
    training, held_out = data()
    try:
        fit(tiny_model(), training, held_out, OfARow(row=row, what=what), spec(), root / name)
    except Exception as error:
        team().wait()
        return type(error).__name__, str(error)
    return "done", ""


def _row_of_one_rank(step: int) -> int:
    """A row that rank 1 of two has in a step, and that comes in no other one."""
    from distaya_ext.train.loop import Loop

    training, held_out = data()
    loop = Loop(tiny_model(), training, held_out, Scripted(), spec(parts=2), Path())
    first = {row for each in range(step) for m in (0, 1) for row in loop.rows_of(each, m)}
    (row, *_) = [row for row in loop.rows_of(step, 1) if row not in first]
    return row


def test_a_loss_of_one_rank_that_is_no_number_ends_all_alike(tmp_path):
    row = _row_of_one_rank(2)
    ends = run_ranks(2, _end, tmp_path, "nan", row, "nan")
    assert ends[0] == ends[1] and ends[0][0] == "TrainingError"
    assert "in step 3 of 4" in ends[0][1] and "the loss is nan" in ends[0][1]
    assert "best parameters so far, of step 2" in ends[0][1]


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(tmp_path):
    row = _row_of_one_rank(2)
    ends = run_ranks(2, _end, tmp_path, "signal", row, "stopped")
    assert [kind for kind, _ in ends] == ["Told", "Told"]
    kept = sorted(p.name for p in (tmp_path / "stopped").glob("checkpoint-*"))
    assert kept == ["checkpoint-00000002", "checkpoint-00000003"]  # the step's own, and no more
    whole = run_ranks(2, _end, tmp_path, "signal", -1, "whole")
    (rest,) = run_ranks(1, _end, tmp_path, "signal", -1, "stopped")
    assert rest[0] == whole[0][0] == "done"
    stopped, uninterrupted = hashes(tmp_path / "stopped"), hashes(tmp_path / "whole")
    last = "checkpoint-00000004/"
    names = [n for n in uninterrupted if n.startswith((last, "best")) or n == "metrics"]
    assert len(names) == 5
    assert {n: stopped[n] for n in names} == {n: uninterrupted[n] for n in names}


def test_a_signal_that_the_launcher_passes_on_is_the_same_one():
    with acting(Team(0, 2)), told_to_stop() as told:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert told() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt), told_to_stop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def _raises(rank: int, root: Path) -> None:
    class Fails(Scripted):
        def __call__(self, model, batch):
            if team().rank == rank and torch.is_grad_enabled():
                raise RuntimeError("of one rank alone")
            return super().__call__(model, batch)

    fit(tiny_model(), *data(), Fails(), spec(), root / "fails")


def test_an_error_of_one_rank_is_told_where_it_was(tmp_path):
    ends = Ranks(2, _raises, 1, tmp_path, DISTAYA_RANK_TIMEOUT="20").ends()
    assert not ends[1][0] and ends[1][1][:2] == ("RuntimeError", "of one rank alone")
    assert not ends[0][0] and ends[0][1][0] == "LostError"


def _refused(root: Path) -> list[tuple[str, str]]:
    found = []
    few = spec(batch_tokens=24, window=24)
    lora = spec(shard="full", train="lora")
    (root / "held").mkdir(exist_ok=True)
    for asked in (few, lora):
        try:
            fit(tiny_model(), *data(), CrossEntropy(), asked, root / "refused")
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_what_ranks_cannot_train(tmp_path):
    for found in run_ranks(2, _refused, tmp_path):
        assert [kind for kind, _ in found] == ["UsageError"] * 2
        assert found[0][1] == (
            "a step takes 1 rows of 24 tokens and there are 2 ranks; make batch_tokens at least 48"
        )
        assert "shard full is for train full" in found[1][1]
