"""Whether a chain that starts can also end: everything that can be known before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..compress.budget import check_disk
from ..compress.packing import Packing
from ..compress.plan import make_plan
from ..compress.settings import from_recipe
from ..documents import open_texts, read_texts
from ..errors import UsageError
from ..recipe import HealSpec, Recipe
from ..texts import check_window
from . import steps
from .journal import WorkFolder

_PER_WEIGHT = 4 * (1 + 3)  # what learns: beside the model, and in a checkpoint with Adam's two


def learns(recipe: Recipe) -> bool:
    """Whether the compression itself looks at texts."""
    return from_recipe(recipe).statistic is not None


def check(recipe: Recipe, texts: Any) -> None:
    """UsageError or InputError for texts that are missing and packages that are not installed."""
    folder = texts if isinstance(texts, (str, Path)) else recipe.calibration.path
    if texts is None and folder is None:
        if not isinstance(recipe.drop_layers, list):
            raise UsageError("drop_layers by score measures on texts, and none are given: --calib")
        if learns(recipe):
            raise UsageError(f"method {recipe.method} needs calibration texts and none are given")
    if recipe.heal is not None:
        named = recipe.heal.path or folder
        if named is None:
            raise UsageError("heal learns from a folder of texts: give heal a path, or --calib")
        if not Path(named).is_file():  # one of chats
            open_texts(named)
        from ..train.adapter import need_peft
        from ..train.fit import check_packages

        check_packages()
        if recipe.heal.train == "lora":
            need_peft("heal by LoRA")
    if recipe.evaluate is not None:
        read_texts(recipe.evaluate.path, parallel=recipe.evaluate.per_line)


def check_model(task: steps.Task) -> None:
    """UsageError for windows longer than the model's positions, InputError for a tokenizer that is
    not there.
    """
    from ..tokenizer import load_tokenizer

    recipe, config = task.recipe, task.checkpoint.config
    if recipe.heal is not None:
        check_window(recipe.heal.window, config)
    if recipe.evaluate is not None and not recipe.evaluate.per_line:
        check_window(recipe.evaluate.window, config)
    if recipe.heal is not None or recipe.evaluate is not None:
        load_tokenizer(task.checkpoint.folder, config.vocab_size)
    if not isinstance(recipe.drop_layers, list):
        from ..influence.choose import how_many

        how_many(recipe.drop_layers, config.num_hidden_layers)
    _written(task)  # patterns that match nothing, layers that are not there


def check_disk_space(task: steps.Task, work: WorkFolder) -> None:
    """ResourceError unless the disk holds what the steps that are left will write."""
    check_disk(work.path, needed(task, work))


def needed(task: steps.Task, work: WorkFolder) -> int:
    """About the bytes the steps that are left will write: the compressed model, the healed one
    (each with the layers that may yet go), what healing keeps beside it. The result itself is
    linked.
    """
    heal, size = task.recipe.heal, _written(task)
    total = 0 if work.finished("compress") else size
    if heal is not None and not work.finished("heal"):
        total += size + learning_bytes(heal, task.checkpoint)
    return total


def learning_bytes(heal: HealSpec, checkpoint: Checkpoint) -> int:
    """About the bytes of the checkpoints that healing keeps, and of its teacher's cache."""
    cache = heal.loss.cache_bytes if heal.loss.cache is not None else None
    return 2 * _PER_WEIGHT * _learning(heal, checkpoint) + (cache or 0)


def _written(task: steps.Task) -> int:
    """Bytes of the compressed model's weight files, before layers go that are yet to be chosen."""
    layers = task.recipe.drop_layers if isinstance(task.recipe.drop_layers, list) else []
    recipe, checkpoint = task.recipe.alone(layers), task.checkpoint.without(layers)
    plan = make_plan(recipe, checkpoint, task.checkpoint.config.num_hidden_layers)
    return Packing(recipe, plan, checkpoint).predicted()


def _learning(heal: HealSpec, checkpoint: Checkpoint) -> int:
    """Numbers that learn, at most."""
    shapes = [checkpoint.entries[f"{name}.weight"].shape for name in checkpoint.linears()]
    ends = 0
    if "embeddings" in heal.also or heal.train == "full":
        rows, columns = checkpoint.entries[f"{checkpoint.architecture.embed}.weight"].shape
        ends = rows * columns
    if heal.train == "full":
        return ends + sum(rows * columns for rows, columns in shapes)
    return ends + heal.rank * sum(rows + columns for rows, columns in shapes)
