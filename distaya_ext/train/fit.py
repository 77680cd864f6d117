"""fit(): train what learns; a killed run, started again, ends as if nothing had happened."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.whole import quiet_transformers
from ..compress.budget import check_disk
from ..errors import InputError, UsageError
from ..ranks import by_first, team, world_size
from ..resume.held import Held
from ..resume.identity import difference
from . import saved
from .data import TrainingData
from .events import Event, Notice, Resumed, Started, Stopped
from .identity import identity
from .loop import Diverged, Loop
from .notes import notes
from .objective import Objective
from .sharding import shard
from .spec import TrainSpec
from .trainer import run_steps, told_to_stop

# Copies of what learns on the disk at once: two checkpoints and a third being written, with two
# moments each, the best and its successor.
_COPIES = 3 * 3 + 2


class TrainingError(InputError):
    """Training had to stop: a loss or gradient was not finite (exit code 3)."""


@dataclass(frozen=True)
class Course:
    """How a training went. Losses are in nats per label; tokens without padding.

    best_step and best_loss are of the parameters the model was left with (None without held-out
    text, where they are those of the last step); held_out the loss after each evaluation, step 0
    before the first step. seconds and tokens_per_second are of the steps alone, over all
    interruptions. resumed_from is the step of the checkpoint the run began with. ranks took part;
    each step's gradient was summed in so many parts.
    """

    steps: int
    best_step: int | None
    best_loss: float | None
    held_out: list[tuple[int, float]]
    tokens: int
    seconds: float
    tokens_per_second: float
    parameters: int
    precision: str
    resumed_from: int | None
    ranks: int
    parts: int
    metrics: Path
    work: Path

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without paths."""
        fields = asdict(self)
        del fields["metrics"], fields["work"]
        return {**fields, "held_out": [list(pair) for pair in self.held_out]}


def fit(
    model: Any,
    training: TrainingData,
    held_out: TrainingData | None,
    objective: Objective,
    spec: TrainSpec,
    work: Path,
    *,
    on_event: Callable[[Event], None] | None = None,
) -> Course:
    """Train every parameter of the model and of objective.modules that requires a gradient.

    model     on its device; parameters that learn are float32
    held_out  rows whose loss decides which parameters are the best; None: the last ones are
    work      folder of this run alone: checkpoints of what learns, metrics.jsonl, best/, loss.png
              and loss.svg; a run that finds a checkpoint of its own there goes on from it, and ends
              with the same bits (same device and number of threads)

    On return the model holds the best parameters. A step's loss is the mean over all its labels,
    however it is split into micro-batches. The first SIGINT or SIGTERM ends the run after its step
    with a checkpoint. TrainingError when a loss or gradient is not finite: the model then holds the
    best parameters so far. InputError when the folder holds another run, UsageError when another
    process uses it, nothing learns, or accelerate or matplotlib is missing.

    Of several ranks all call it with the same arguments and get the same result; the first one
    alone writes, and tells events. Each learns from its share of a step's rows; a step needs a row
    for every rank. The same number of parts (spec.parts; None: as many as there are ranks, or what
    the checkpoint was made with) gives the same bits with any number of ranks up to it, unless what
    learns is sharded (spec.shard): then with the same number of ranks. Accidents and signals of one
    rank end the run on all of them after the same step.
    """
    check_packages()
    if not len(training):
        raise InputError("there are 0 windows to train on")
    if held_out is not None and not len(held_out):
        raise InputError("there are 0 held-out windows; pass None to do without")
    work = Path(work)
    with _alone(work), _as_it_was(model, spec), quiet_transformers():
        where = next(model.parameters()).device
        shard(model, objective.modules, spec, where)
        loop = Loop(model, training, held_out, objective, spec, work, on_event)
        loop.identity = identity(loop)
        resumed = _begin(loop)
        try:
            if resumed is None:
                loop.evaluate()
                loop.save()
            with told_to_stop() as told:
                if loop.step < spec.steps:
                    run_steps(loop, told)
                else:
                    loop.stop = next((s for s in team().gather(told()) if s is not None), None)
                stopped = loop.stop
        except Diverged as error:
            raise _given_up(loop, str(error)) from None
        finally:
            loop.gradients.leave()
        if stopped is not None:
            name = signal.Signals(stopped).name
            done = f"{name} after step {loop.step} of {spec.steps}"
            loop.tell(Stopped(f"{done}; the same call goes on from there"))
            team().wait()  # the first rank to end may have the others ended, and one has written
            signal.raise_signal(stopped)
            raise KeyboardInterrupt  # where the signal was handled and ignored
        saved.load_best(work, loop.parameters)
    return _course(loop, resumed)


def check_packages() -> None:
    """UsageError unless what training needs is installed, and torchrun's processes are one team."""
    if world_size() != team().world:
        raise UsageError(
            f"WORLD_SIZE says {world_size()} processes, and {team().world} take part; train inside "
            "ranks.joined(), or start without torchrun"
        )
    absent = [n for n in ("accelerate", "matplotlib") if importlib.util.find_spec(n) is None]
    if absent:
        raise UsageError(f"training needs {' and '.join(absent)}: pip install 'distaya-ext[train]'")


def _begin(loop: Loop) -> int | None:
    """Seed the generators, or go on from the newest checkpoint; returns its step."""
    from transformers import set_seed

    set_seed(loop.spec.seed % (1 << 32))
    found = by_first(lambda: _newest(loop.work))
    if found is None:
        if team().first:
            shutil.rmtree(loop.work / "best", ignore_errors=True)
            (loop.work / saved.METRICS).unlink(missing_ok=True)
    else:
        folder, state = Path(found[0]), found[1]
        if (held := state.get("run", {})) != loop.identity:
            raise InputError(
                f"{loop.work} holds step {state['step']} of another training: "
                f"{difference(held, loop.identity)}; remove that folder to start anew"
            )
        loop.restore(folder, state)
        if team().first:
            shutil.copyfile(folder / saved.METRICS, loop.work / saved.METRICS)
    spec = loop.spec
    counts = len(loop.training), 0 if loop.held_out is None else len(loop.held_out)
    numbers = sum(p.numel() for p in loop.parameters.values())
    loop.tell(Started(spec.steps, loop.rows, *counts, numbers, loop.precision))
    for note in notes(loop, None if found is None else found[1]):
        loop.tell(Notice(note))
    if found is None:
        by_first(lambda: check_disk(loop.work, _COPIES * 4 * numbers))
        return None
    loop.tell(Resumed(loop.step, spec.steps))
    return loop.step


def _newest(work: Path) -> list[Any] | None:
    found = saved.newest(work)
    return None if found is None else [str(found[0]), found[1]]


def _given_up(loop: Loop, reason: str) -> TrainingError:
    """Leave the model with the best parameters so far; the sentence that says so."""
    best = saved.load_best(loop.work, loop.parameters)
    if best is not None:
        kept = (
            f"the best parameters so far, of step {best[0]} with a held-out loss of {best[1]:.4f}, "
            f"are in {loop.work / 'best'}"
        )
    else:
        found = by_first(lambda: _newest(loop.work))
        assert found is not None  # step 0 is saved before anything is learnt
        saved.load_parameters(Path(found[0]) / "parameters.safetensors", loop.parameters)
        kept = f"the parameters of step {found[1]['step']} are in {found[0]}"
    rate = loop.optimizer.param_groups[0]["lr"]
    sentence = (
        f"training stopped in step {loop.step + 1} of {loop.spec.steps} at a learning rate of "
        f"{rate:g}: {reason}; {kept}"
    )
    loop.tell(Stopped(sentence))
    return TrainingError(sentence)


def _course(loop: Loop, resumed: int | None) -> Course:
    from .plot import plot_losses

    metrics = loop.work / saved.METRICS
    if team().first:
        plot_losses(metrics, loop.work)
    loop.seconds = team().tell(loop.seconds)  # each has a clock of its own
    return Course(
        steps=loop.step,
        best_step=None if loop.best is None else loop.best[0],
        best_loss=None if loop.best is None else loop.best[1],
        held_out=list(loop.losses),
        tokens=loop.tokens,
        seconds=loop.seconds,
        tokens_per_second=loop.tokens / max(loop.seconds, 1e-9),
        parameters=sum(p.numel() for p in loop.parameters.values()),
        precision=loop.precision,
        resumed_from=resumed,
        ranks=team().world,
        parts=loop.dealt.parts.count,
        metrics=metrics,
        work=loop.work,
    )


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Hold the folder's lock, rank 0 for all. UsageError when another run does."""
    held = Held(work, ".lock")
    by_first(held.enter)
    try:
        yield
    finally:
        if team().first:
            held.leave()


@contextmanager
def _as_it_was(model: Any, spec: TrainSpec) -> Iterator[None]:
    """The model's mode, gradient checkpointing and the random generators, put back at the end."""
    mode = model.training
    before = saved.get_generators()
    if spec.gradient_checkpointing:
        _checkpointing(model, True)
    try:
        yield
    finally:
        saved.set_generators(*before)
        if spec.gradient_checkpointing:
            _checkpointing(model, False)
        model.train(mode)


def _checkpointing(model: Any, on: bool) -> None:
    """Have the decoder layers' activations made again in the backward pass, or not."""
    new = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{new}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{new}_checkpointing_disable")()
