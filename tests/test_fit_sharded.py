"""Training sharded over ranks: what each of them holds, and that the student learns the same."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import data, spec, state, tiny_model
from fitting_ranks import UNEVEN, Told, hashes, off, plain, ragged
from ranked import run_ranks

from distaya_ext.ranks import team
from distaya_ext.train import plot
from distaya_ext.train.finetune import CrossEntropy
from distaya_ext.train.fit import fit


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
        "course": plain(course),
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
        assert off(*ends, start) < bound
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
    assert off(*ends, state(tiny_model())) < 1e-6
