"""The steps themselves: each reads what the ones before it wrote, and writes one folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..compress.driver import compress
from ..compress.fallbacks import Fallbacks
from ..compress.shared import shared_calibration
from ..errors import GateError
from ..ranks import team
from ..recipe import Recipe

LAYERS = "layers.json"
EVALUATION = "evaluation.json"

OnEvent = Callable[[Any], None]
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Task:
    """What all steps are given. texts: of the calibration, as compress() takes them."""

    checkpoint: Checkpoint
    recipe: Recipe
    texts: Any
    on_event: OnEvent
    on_progress: OnProgress | None
    device: str
    offline: bool
    strict: bool = False
    spill: Path | None = None

    @property
    def model(self) -> str:
        """The source, as the recipe names it."""
        return self.recipe.model


def drop(task: Task, folder: Path, scratch: Path) -> None:
    """Choose the layers that go: layers.json holds them, and what speaks for each."""
    from ..influence.choose import choose

    spec, calibration = task.recipe.drop_layers, task.recipe.calibration
    few = calibration.model_copy(update={"tokens": spec.tokens})
    recipe = task.recipe.model_copy(update={"calibration": few})
    windows = shared_calibration(task.texts, recipe, task.checkpoint)
    if team().first:
        scratch.mkdir(exist_ok=True)
    team().wait()
    choice = choose(
        task.checkpoint,
        windows,
        spec,
        device=task.device,
        on_event=task.on_event,
        scratch=scratch,
        max_ram=recipe.max_ram_bytes,
    )
    if team().first:
        told = choice.to_dict() | {"layers": choice.scores.to_dict()}
        write_json(scratch / LAYERS, told)
        scratch.rename(folder)


def dropped(folder: Path) -> list[int]:
    """The layers that drop() chose."""
    return json.loads((folder / LAYERS).read_text(encoding="utf-8"))["dropped"]


def shrink(task: Task, layers: list[int], folder: Path, work: Path) -> None:
    """Leave layers out, prune and quantise, layer by layer; work holds what a later run goes on
    with.
    """
    recipe = task.recipe.alone(layers)
    compress(
        task.model,
        folder,
        recipe,
        task.texts,
        on_event=task.on_event,
        device=task.device,
        offline=task.offline,
        strict=task.strict,
        work=work,
        spill=task.spill,
    )


def judge_fallbacks(task: Task, folder: Path, *, kept: bool) -> None:
    """NumericsError when the chain is strict and the compression that lies in the folder, which an
    earlier run may have made without, is degraded; one that was kept is told of again.
    """
    told = json.loads((folder / "results.json").read_text(encoding="utf-8")).get("fallbacks", {})
    found = Fallbacks.read(told)
    if kept and (event := found.event(told.get("of", 0))):
        task.on_event(event)
    if task.strict:
        found.refuse()


def heal(task: Task, student: Path, folder: Path, work: Path) -> None:
    """Train what was compressed against the model before; work holds what a later run goes on
    with.
    """
    from ..train.distill import distill

    spec = task.recipe.heal
    distill(
        spec.teacher or task.model,
        student,
        folder,
        heal_texts(task),
        spec,
        work=work,
        device=task.device,
        offline=task.offline,
        on_event=task.on_event,
    )


def heal_texts(task: Task) -> Any:
    """The folder that healing learns from; None where none is named."""
    named = task.recipe.heal.path
    return named if named is not None else task.texts or task.recipe.calibration.path


def measure(task: Task, models: dict[str, Path], folder: Path, scratch: Path) -> None:
    """Evaluate the models, by the step that wrote them, against the one before."""
    from ..documents import read_texts
    from ..evaluate import evaluate

    spec = task.recipe.evaluate
    texts = read_texts(spec.path, parallel=spec.per_line) if team().first else {}
    found, gate = {}, None
    for name, model in models.items():
        result = evaluate(
            model,
            texts,
            against=task.model,
            window=spec.window,
            tokens=spec.tokens,
            per_line=spec.per_line,
            device=task.device,
            offline=task.offline,
            on_progress=task.on_progress,
            continuations=spec.continuations,
            new_tokens=spec.new_tokens,
        )
        found[name] = {**result.to_dict(), "model": name}
    try:  # of the last one, which is what is written
        result.gate(**spec.gate)
    except GateError as error:
        gate = str(error)
    if team().first:
        scratch.mkdir()
        write_json(scratch / EVALUATION, {"steps": found, "gate": gate})
        scratch.rename(folder)


def write_json(path: Path, value: Any) -> None:
    """Plain values, NaN refused."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
