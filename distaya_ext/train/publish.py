"""From a training to a folder: the work beside the result, and the result with its record."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.writer import check_output
from ..errors import DistayaError, LostError, add_note
from ..ranks import by_first, team
from ..versions import versions
from .data import TrainingData
from .events import Event
from .fit import Course, fit
from .objective import Objective
from .spec import TrainSpec

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from .merge import Merged
    from .parts import Parts

RECORD = "training.json"
_SHOWN = ("metrics.jsonl", "loss.png", "loss.svg")


@dataclass(frozen=True)
class Trained:
    """A published result: where it is, how the training went, its record (training.json), and what
    was written of what learnt.
    """

    out: Path
    course: Course
    record: dict[str, Any]
    merged: Merged


def work_folder(out: str | Path) -> Path:
    """Where the training of `out` keeps its checkpoints: a hidden folder beside it."""
    whole = Path(os.path.abspath(out))
    return whole.with_name(f".{whole.name}.training")


def check_place(out: str | Path, source: Path, overwrite: bool) -> None:
    """InputError, before anything is learnt, for an output that could not be written."""
    by_first(lambda: check_output(Path(out), overwrite=overwrite, source=source))


def train_and_publish(
    checkpoint: Checkpoint,
    parts: Parts,
    training: TrainingData,
    held_out: TrainingData | None,
    objective: Objective,
    spec: TrainSpec,
    out: str | Path,
    *,
    about: dict[str, Any],
    found: Callable[[], dict[str, Any]] | None = None,
    overwrite: bool = False,
    work: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Trained:
    """fit() in the work folder of `out`, then parts.write(), then the work folder is removed.

    about is added to the record, and so is what found() tells of the trained model, which holds its
    best parameters when it is called. The work folder stays when anything fails or interrupts,
    which an error's sentence says, so that the same call goes on where it stopped; work names
    another one. All ranks call it, the first one writes, and all get the same result.
    """
    folder = work or work_folder(out)
    check_place(out, checkpoint.folder, overwrite)
    try:
        course = fit(parts.model, training, held_out, objective, spec, folder, on_event=on_event)
        record = {
            **about,
            "spec": spec.model_dump(mode="json"),
            "texts": _told(training, held_out),
            "course": course.to_dict(),
            **(found() if found is not None else {}),
            "versions": versions("accelerate"),
        }

        def add(model: Path, _: Merged) -> None:
            for name in _SHOWN:
                shutil.copyfile(folder / name, model / name)
            text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
            (model / RECORD).write_text(text + "\n", encoding="utf-8")

        merged = parts.write(checkpoint, out, overwrite=overwrite, extra=add)
    except DistayaError as error:
        if any(folder.glob("checkpoint-*")) and str(folder) not in str(error):
            kept = f"what was trained is kept in {folder}"
            if isinstance(error, LostError):  # it holds which rank failed, and with what code
                add_note(error, kept)
                raise
            raise type(error)(f"{error} ({kept})") from error
        raise
    if team().first:
        shutil.rmtree(folder)
    return Trained(Path(out), course, record, merged)


def _told(training: TrainingData, held_out: TrainingData | None) -> dict[str, Any]:
    """The numbers of the rows, for the record."""
    return {
        "windows": len(training),
        "held_out": 0 if held_out is None else len(held_out),
        "longest": training.window,
        "labels": training.labelled,
        "tokens_per_language": training.tokens_per_language,
        "sha256": training.digest(),
        "notes": training.notes,
    }
