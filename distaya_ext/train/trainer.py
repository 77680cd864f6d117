"""transformers' Trainer around our loop: it drives the steps, we say what a step is.

Under torchrun every rank has a Trainer of its own, which sees this rank's micro-batches. accelerate
finds the ranks joined already; the model is not wrapped, because DistributedDataParallel averages
over ranks, and a step's gradient is a mean over labels, of which ranks have different numbers: the
loop sums gradients itself (gradients.py) or has FSDP do it (sharding.py).
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..ranks import team
from .loop import Loop
from .saved import get_generators, set_generators

_SAME = 5.0  # seconds in which a second signal is the launcher's passing on of the first


class Micros(Dataset):
    """This rank's micro-batches in the order of the run, from step `start` on: the numbers of their
    rows, none where the rank has nothing left to do in a step, and the turn within the step.
    """

    def __init__(self, loop: Loop, start: int) -> None:
        self.loop, self.start = loop, start

    def __len__(self) -> int:
        return (self.loop.spec.steps - self.start) * len(self.loop.turns)

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, turn = divmod(index, len(self.loop.turns))
        place = self.loop.turns[turn]
        rows = [] if place is None else self.loop.rows_of(self.start + step, place[1])
        return {"rows": rows, "turn": turn}


def run_steps(loop: Loop, told: Callable[[], int | None]) -> None:
    """Train from loop.step to the end, or until told() is a signal, on any rank: then its step is
    finished, and loop.stop is the signal.

    Checkpoints, metrics and evaluations are the loop's: Trainer is given the rest of the run as if
    it were all of it.
    """
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    generators = get_generators()
    loop.told = told

    class AfterStep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            # What Trainer sets up is no part of the run: neither the time of it, nor its seeding.
            set_generators(*generators)
            loop.new_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            loop.after_step()
            if team().alone:
                loop.stop = told()  # it may have come since
            if loop.stop is not None:
                loop.save()
            control.should_training_stop = loop.stop is not None or loop.step >= loop.spec.steps
            return control

    class OurTrainer(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            # A generator of its own: making an iterator must not move the global one, which a
            # resumed run has to find where the interrupted one left it.
            own = torch.Generator()
            return DataLoader(self.train_dataset, batch_size=None, generator=own)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            model.train()
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            loop.passed_back(inputs["turn"])
            return loss.detach()

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            return loop.learn(inputs["rows"], inputs["turn"])

    loop.whole._is_accelerate_prepared = True  # as it is: accelerate is not to wrap it
    turns = len(loop.turns)
    trainer = OurTrainer(
        model=loop.whole,
        args=_arguments(loop.work, loop.spec.steps - loop.step, turns, loop.spec.seed),
        train_dataset=Micros(loop, loop.step),
        callbacks=[AfterStep()],
        optimizers=(loop.optimizer, loop.scheduler),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if loop.stop is None:  # a signal after the last gathering of them
        loop.stop = next((each for each in team().gather(told()) if each is not None), None)


def _arguments(work: Path, steps: int, micros: int, seed: int) -> Any:
    """Settings under which Trainer saves, logs, clips and moves nothing by itself."""
    from transformers import TrainingArguments

    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
        found = TrainingArguments(
            output_dir=str(work),
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=micros,
            max_grad_norm=0.0,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            log_level="error",
            seed=seed % (1 << 32),
            use_cpu=True,  # the model is where it should be, and so are the batches
        )
    torch.set_num_threads(threads)  # under torchrun accelerate has chosen others
    return found


@contextmanager
def told_to_stop() -> Iterator[Callable[[], int | None]]:
    """Inside the block the first SIGINT or SIGTERM is noted, the second one acts as before. Under
    torchrun, which passes on to its processes what they have had from the terminal already, one
    that follows within seconds is the first one again.

    Yields a function that returns the signal noted, or None.
    """
    noted: list[int] = []
    at: list[float] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        if noted and not team().alone and time.monotonic() - at[0] < _SAME:
            return
        if noted:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        at.append(time.monotonic())
        noted.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
