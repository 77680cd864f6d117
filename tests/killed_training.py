"""Trainings in processes of their own that are really killed; run by test_fit_resume.

    python killed_training.py FOLDER

FOLDER/whole gets an uninterrupted run, the others runs that are killed and started again until they
end: FOLDER/times after some odd fractions of a second, the others at the place they are named by,
where the process tells us that it is there and waits. Processes are forked, so that the imports,
which take longer than all of the training, are made once; there is one thread, which fork needs.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers.trainer
from tiny import FAMILIES, windows
from transformers import AutoModelForCausalLM

from distaya_ext import durable
from distaya_ext.train import plot, saved
from distaya_ext.train.data import TrainingData
from distaya_ext.train.events import Evaluated, TrainStep
from distaya_ext.train.finetune import CrossEntropy
from distaya_ext.train.fit import fit
from distaya_ext.train.spec import TrainSpec

TRAINER = transformers.trainer  # imported before the fork
SPEC = TrainSpec(
    train="full",
    steps=14,
    window=24,
    batch_tokens=120,  # 5 rows of 13: epochs end within steps
    micro_tokens=48,
    evaluate_every=4,
    save_every=3,
    learning_rate=3e-3,
    weight_decay=0.01,
    seed=5,
)

PLACES = {
    "early": (TrainStep, 2),  # before there is any checkpoint but the first
    "step": (TrainStep, 8),  # between two checkpoints
    "evaluated": (Evaluated, 12),  # the best is written and the checkpoint of the step is not
    "interrupt": (TrainStep, 8),
}


def train(work: Path, on_event=None) -> None:
    """A model with dropout, whose random numbers a resumed run has to draw from the same place."""
    torch.set_num_threads(1)
    plot.plot_losses = lambda *_: []  # takes longer than all the steps
    torch.manual_seed(1)
    config = FAMILIES["llama"]
    config.attention_dropout = 0.2
    model = AutoModelForCausalLM.from_config(config)
    ids = windows(17).ids
    training, held_out = (
        TrainingData.of_windows(ids[:13]),
        TrainingData.of_windows(ids[13:], first=13),
    )
    fit(model, training, held_out, CrossEntropy(), SPEC, work, on_event=on_event)


def child(work: Path, where: str, here: int) -> None:
    """Train; at `where` tell the parent and wait to be killed."""

    def arrived() -> None:
        os.write(here, b"x")
        if where == "interrupt":
            return  # goes on to the end of its step
        time.sleep(60)

    def on_event(event: object) -> None:
        kind, step = PLACES.get(where, (None, 0))
        if kind is not None and isinstance(event, kind) and event.step == step:
            arrived()

    if where == "saving":
        sync, times = durable.sync, itertools.count()
        # Both names under which it is called: by checkpoints, and by what is written whole.
        saved.sync = durable.sync = lambda path: arrived() if next(times) == 16 else sync(path)
    train(work, on_event)


def start(work: Path, where: str) -> tuple[int, int]:
    """Fork a training; its process id and the end of the pipe it tells us on."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    try:
        child(work, where, write)
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def finish(pid: int) -> int:
    """Exit status of the process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(work: Path, where: str) -> int:
    """Kill a training at a place, or at times, until it ends; how often it was."""
    if where == "times":
        for number in range(12):
            pid, _ = start(work, "")
            time.sleep(0.15 * 1.5**number)
            os.kill(pid, signal.SIGKILL)
            if (status := finish(pid)) == 0:
                return number
            assert status == -signal.SIGKILL, status
        raise AssertionError("it never ends")
    pid, told = start(work, where)
    assert os.read(told, 1) == b"x", f"it never came to {where}"
    left = sorted(path.name for path in work.iterdir())
    os.kill(pid, signal.SIGINT if where == "interrupt" else signal.SIGKILL)
    assert finish(pid) == (130 if where == "interrupt" else -signal.SIGKILL)
    print(where, *left, flush=True)
    assert finish(start(work, "")[0]) == 0
    return 1


def main(root: Path) -> None:
    assert finish(start(root / "whole", "")[0]) == 0
    for where in (*PLACES, "saving", "times"):
        print(where, killed(root / where, where), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
