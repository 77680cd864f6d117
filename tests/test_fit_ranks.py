"""Training by several ranks: the bits of one process, one end for all, and what sharding keeps."""

import hashlib
import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranked
import torch
from fitting import Scripted, data, spec, state, tiny_model
from ranked import Ranks, run_ranks
from tiny import windows

from distaya_ext.errors import LostError, notes
from distaya_ext.ranks import Parts, Team, team
from distaya_ext.ranks.team import acting
from distaya_ext.train import plot, publish
from distaya_ext.train.data import IGNORED, TrainingData
from distaya_ext.train.dealing import deal
from distaya_ext.train.events import Evaluated, TrainStep
from distaya_ext.train.finetune import CrossEntropy
from distaya_ext.train.fit import fit
from distaya_ext.train.trainer import told_to_stop

ranked._context.set_forkserver_preload(
    ["torch.distributed", "transformers.trainer", "distaya_ext.train.distill", "peft"]
)
CLOCK = ("seconds", "tokens_per_second")


def ragged(rows: int = 15) -> tuple[TrainingData, TrainingData]:
    """Rows with up to 16 labels, every other one with none, and 5 to be held out."""
    ids = windows(rows + 5).ids
    numbers = torch.arange(rows + 5)
    mask = torch.arange(24) < ((numbers * 7 % 24) * (numbers % 2) + 1)[:, None]
    labels = torch.where(mask & (torch.arange(24) % 3 > 0), ids, IGNORED)
    whole = TrainingData(ids * mask, labels, mask, ["en"] * (rows + 5))
    return whole.take(numbers[:rows]), whole.take(numbers[rows:], first=rows)


def dropping() -> torch.nn.Module:
    model = tiny_model()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


# 7 rows a step in micro-batches of up to two: of 3 parts they make 1, 1 and 2.
UNEVEN = spec(batch_tokens=7 * 24, micro_tokens=48, weight_decay=0.01, schedule="constant")


def hashes(work: Path) -> dict[str, Any]:
    """Of everything a run leaves but what tells of times, and its metrics without them."""
    found: dict[str, Any] = {}
    for path in sorted(work.rglob("*.safetensors")):
        found[str(path.relative_to(work))] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    return found


def _plain(course: Any) -> dict[str, Any]:
    return {k: v for k, v in course.to_dict().items() if k not in (*CLOCK, "ranks")}


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
        "course": _plain(course),
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
    assert _off(ends[1], ends[0], start) < 1e-6  # AdamW makes much of the rounding


def _off(found: dict, there: dict, start: dict) -> float:
    """Squared distance of two ends over that of the way to one of them."""
    off = sum(float((found[n] - p).square().sum()) for n, p in there.items())
    return off / sum(float((start[n] - p).square().sum()) for n, p in there.items())


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


class Told(Exception):
    """SIGTERM as it was before the training."""


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


# ---- sharded ----


@dataclass
class Looking(CrossEntropy):
    """Notes how much of the model this rank has while it trains."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def __call__(self, model, batch):
        from distaya_ext.train.sharding import is_sharded, local

        layers = model.model.layers.parameters()
        self.held["layers"] = sum(local(p).numel() for p in layers if is_sharded(p))
        return super().__call__(model, batch)


def _pruned(model: torch.nn.Module) -> torch.nn.Module:
    """The model with one matrix of half zeros, and what learns made ready by parts.prepare()."""
    from distaya_ext.train.parts import prepare

    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, ::2] = 0
    prepare(model, spec())
    return model


def _sharded(root: Path, family: str, dtype: torch.dtype, shard: str) -> dict[str, Any]:
    plot.plot_losses = lambda *_: []
    from distaya_ext.train import fit as fits
    from distaya_ext.train.loop import Loop
    from distaya_ext.train.sharding import gathered, local

    loops = []
    fits.Loop = lambda *args: loops.append(Loop(*args)) or loops[0]
    model = _pruned(tiny_model(family).to(dtype))
    looking, work = Looking(), root / f"{family} {shard} {team().world}"
    asked = UNEVEN.model_copy(update={"shard": shard, "gradient_checkpointing": True})
    course = fit(model, *ragged(), looking, asked, work)
    zeros = model.model.layers[0].mlp.down_proj
    inner = next(p for n, p in zeros.named_parameters() if "weight" in n)
    named = {n: p.detach() for n, p in model.named_parameters()}
    moments = [t for s in loops[0].optimizer.state.values() for t in s.values() if t.ndim]
    team().wait()
    return {
        "moments": sum(local(t).nbytes for t in moments),
        "held": looking.held["layers"],
        "here": sum(local(p).nbytes for p in named.values()),
        "all": sum(p.nbytes for p in named.values()),
        "layers": sum(p.numel() for p in model.model.layers.parameters()),
        "state": {n: gathered(p).float().numpy() for n, p in named.items()},
        "zeros": int((gathered(inner)[:, ::2] == 0).all()),
        "course": _plain(course),
        "metrics": hashes(work)["metrics"],
    }


@pytest.mark.parametrize(
    ("family", "world", "dtype", "bound"),
    [("llama", 3, torch.float32, 1e-6), ("cohere", 2, torch.bfloat16, 1e-2)],
)
def test_sharded_students_learn_the_same(tmp_path, family, world, dtype, bound):
    whole = run_ranks(world, _sharded, tmp_path, family, dtype, "none")[0]
    start = {n: p.float() for n, p in state(_pruned(tiny_model(family).to(dtype))).items()}
    for found in run_ranks(world, _sharded, tmp_path, family, dtype, "full"):
        ends = [{n: torch.from_numpy(v) for n, v in e["state"].items()} for e in (found, whole)]
        assert _off(*ends, start) < bound
        assert found["zeros"] and found["course"]["parts"] == world
        assert found["course"]["best_step"] == whole["course"]["best_step"] > 0
        # A share of the rows of each: those of 64 are 21 or 22 of 3 ranks.
        assert found["held"] <= 1.05 * found["layers"] / world
        assert found["here"] <= 1.05 * found["all"] / world
        assert found["moments"] == 2 * found["here"]
        losses = [[line["loss"] for line in e["metrics"] if "loss" in line] for e in (found, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert whole["here"] == whole["all"] == whole["moments"] / 2 and whole["held"] == 0


def _begun(root: Path, steps: int, shard: str) -> dict[str, Any]:
    """Steps of a run of four; more of them than a checkpoint has go on from it."""
    plot.plot_losses = lambda *_: []

    class Stops(CrossEntropy):
        calls = 0

        def __call__(self, model, batch):
            self.calls += torch.is_grad_enabled()
            if steps < 4 and self.calls == 2 * steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(model, batch)

    def told(number: int, frame: object) -> None:
        raise Told(number)

    signal.signal(signal.SIGTERM, told)
    model, notes = tiny_model(), []
    asked = spec(shard=shard, micro_tokens=24, schedule="constant", warmup=0.0)
    objective = Stops()
    objective.identity = CrossEntropy.identity
    try:
        training, _ = data()
        course = fit(model, training, None, objective, asked, root / "run", on_event=notes.append)
    except Told:
        return {}
    said = [note.message for note in notes if hasattr(note, "message")]
    return {
        "state": {n: p.numpy() for n, p in state(model).items()},
        "resumed": course.resumed_from,
        "said": said,
    }


def test_a_sharded_run_goes_on_in_one_process(tmp_path):
    assert run_ranks(2, _begun, tmp_path, 2, "full") == [{}, {}]
    (rest,) = run_ranks(1, _begun, tmp_path, 4, "full")
    (whole,) = run_ranks(1, _begun, tmp_path / "whole", 4, "none")
    assert rest["resumed"] == 2
    assert "what learns was sharded where the checkpoint was made" in rest["said"][0]
    assert rest["said"][1] == "there is one process, so nothing is sharded"
    ends = [{n: torch.from_numpy(v) for n, v in e["state"].items()} for e in (rest, whole)]
    assert _off(*ends, state(tiny_model())) < 1e-6


def test_a_lost_rank_stays_that_and_tells_what_is_kept(tmp_path, monkeypatch):
    lost = LostError("rank 1 of 2 was killed or lost")
    lost.exit_code = 3  # of the rank that failed

    def fails(*args, **more):
        (tmp_path / "work" / "checkpoint-7").mkdir(parents=True)
        raise lost

    monkeypatch.setattr(publish, "fit", fails)
    monkeypatch.setattr(publish, "check_place", lambda *args: None)
    given = SimpleNamespace(folder=tmp_path), SimpleNamespace(model=None)
    with pytest.raises(LostError) as raised:
        publish.train_and_publish(
            *given, None, None, None, None, tmp_path / "out", about={}, work=tmp_path / "work"
        )
    assert raised.value is lost and lost.exit_code == 3
    assert notes(lost) == [f"what was trained is kept in {tmp_path / 'work'}"]
