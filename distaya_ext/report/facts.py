"""Everything that a folder of ours tells of itself, read from its files and checked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from ..durable import write_whole
from ..errors import DistayaError, InputError, UsageError
from .records import (
    Evaluations,
    Layers,
    Module,
    Record,
    Results,
    Speed,
    Steps,
    Training,
)
from .words import plain_name

STORED = {"evaluation": "evaluation.json", "speed": "speed.json"}
_MOST_BYTES = 64 << 20  # of one file of facts
_MOST_POINTS = 2000  # of a training curve

T = TypeVar("T")
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Facts:
    """What the files hold, None or empty where there is none.

    losses: (step, nats per label) of each training step, thinned to some two thousand; recipe: its
    fields, and recipe_text the file; config: config.json; damaged: what could not be read, and why.
    """

    folder: Path
    results: Results | None = None
    modules: list[Module] = field(default_factory=list)
    evaluations: Evaluations | None = None
    speed: Speed | None = None
    training: Training | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    layers: Layers | None = None
    steps: Steps | None = None
    merged: dict[str, Any] | None = None
    student: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    @property
    def tells(self) -> bool:
        """Whether a run of ours left anything to tell."""
        found = (self.results, self.evaluations, self.speed, self.training, self.layers)
        return any(each is not None for each in (*found, self.merged, self.student))

    @property
    def trained_before(self) -> bool:
        """Whether the training that is told of was that of the model before the compression."""
        steps = [] if self.steps is None else [step.name for step in self.steps.steps]
        return self.results is not None and "heal" not in steps

    @property
    def source(self) -> str | None:
        """The model that this one was made from, without the way to it."""
        teacher = (self.student or {}).get("teacher")
        named = self.recipe.get("model") or teacher
        if named is None and self.evaluations is not None:
            named = self.evaluations.last.base
        return plain_name(named) if isinstance(named, str) else None


def read(folder: str | Path, damaged: list[str] | None = None) -> Facts:
    """The facts in a folder. Each file may be missing; InputError in one sentence, with the name of
    the file, for one that is damaged. Given a list `damaged`, the sentence goes there instead and
    the file counts as missing: a source model may have a file of such a name, which is not ours.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"{folder} is no folder, so there is nothing to report")

    def tried(read_one: Callable[..., T], *arguments: Any, without: T) -> T:
        try:
            return read_one(*arguments)
        except InputError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
            return without

    def record(name: str, kind: type[R]) -> R | None:
        return tried(_record, place, name, kind, without=None)

    text = tried(_text, place / "recipe.yaml", without="")
    return Facts(
        folder=place,
        results=record("results.json", Results),
        modules=tried(_modules, place / "layers.csv", without=[]),
        evaluations=record("evaluation.json", Evaluations),
        speed=record("speed.json", Speed),
        training=record("training.json", Training),
        losses=tried(_losses, place / "metrics.jsonl", without=[]),
        layers=record("layers.json", Layers),
        steps=record("steps.json", Steps),
        merged=tried(_json, place, "merge.json", without=None),
        student=tried(_json, place, "student.json", without=None),
        recipe=tried(_recipe, place / "recipe.yaml", text, without={}),
        recipe_text=text,
        config=tried(_json, place, "config.json", without=None) or {},
        damaged=damaged or [],
    )


def store(folder: str | Path, name: Literal["evaluation", "speed"], value: Mapping) -> Path:
    """Write evaluation.json ({"steps": {name: Evaluation.to_dict()}, "gate": str | None}) or
    speed.json (what `distaya bench model --json` prints) into a folder of ours, and render its
    pages again; returns the file.

    Names of models lose the way to them. InputError for a folder that distaya did not write, and
    for a value that is not of the form above: nothing is written then.
    """
    from ..checkpoint.writer import is_ours
    from ..finished import complete

    place = Path(folder)
    if not is_ours(place):
        raise InputError(f"{folder} was not written by distaya, so no result is stored in it")
    told = _plain(value)
    _check({"evaluation": Evaluations, "speed": Speed}[name], told, STORED[name], place)
    path = place / STORED[name]
    try:
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{STORED[name]} would hold what JSON has no form for: {error}") from None
    data = text.encode("utf-8", "backslashreplace")  # half of a surrogate pair stays readable
    write_whole(path, lambda file: file.write_bytes(data))
    complete(place)
    return path


def check_stores(model: str | Path) -> Path:
    """The folder that --report writes into. UsageError for what is no folder of ours."""
    from ..checkpoint.writer import is_ours

    place = Path(model).expanduser()
    if not is_ours(place):
        raise UsageError(
            f"--report writes into the folder of the model, and {model} is none that distaya wrote"
        )
    return place


def _plain(value: Any) -> Any:
    """The same with names of models instead of paths; samples hold what models said, as it was."""
    if isinstance(value, Mapping):
        return {str(key): _plain_entry(key, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _plain_entry(key: Any, value: Any) -> Any:
    if key == "samples":
        return value
    return plain_name(value) if key in _NAMES and isinstance(value, str) else _plain(value)


_NAMES = ("model", "base", "name")


def _text(path: Path) -> str:
    """A file's text, "" where there is none."""
    if not path.is_file():
        return ""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(
                f"{_of(path)} is larger than {_MOST_BYTES >> 20} MiB: it is none of ours"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{_of(path)} is not UTF-8 at byte {error.start}") from None


def _of(path: Path) -> str:
    return f"{path.name} of {path.parent.name}"


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    from ..checkpoint.folder import read_json

    if not _text(folder / name):
        return None
    return read_json(folder, name)


def _record(folder: Path, name: str, kind: type[R]) -> R | None:
    told = _json(folder, name)
    return None if told is None else _check(kind, told, name, folder)


def _check(kind: type[R], told: Any, name: str, folder: Path) -> R:
    try:
        return kind.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:120]
        raise InputError(f"{name} of {folder.name} is damaged at {where}: {first['msg']}") from None


def _modules(path: Path) -> list[Module]:
    lines = csv.DictReader(_text(path).replace("\0", "").splitlines())
    found = []
    for number, line in enumerate(lines, 2):
        told = {key: value for key, value in line.items() if key and value not in ("", None)}
        try:
            found.append(Module.model_validate(told))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{_of(path)} is damaged in line {number}, {where}: {first['msg']}"
            ) from None
    return found


def _losses(path: Path) -> list[tuple[int, float]]:
    found: list[tuple[int, float]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            told = json.loads(line)
            if "loss" in told:
                found.append((int(told["step"]), float(told["loss"])))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{_of(path)} is damaged in line {number}") from None
    step = -(-len(found) // _MOST_POINTS) or 1
    return found[::step]


def _recipe(path: Path, text: str) -> dict[str, Any]:
    """The fields, none where the file only says that the folder is ours."""
    from ..recipe_file import read_fields

    if all(not line.strip() or line.startswith("#") for line in text.splitlines()):
        return {}
    try:
        return read_fields(path)
    except DistayaError as error:
        raise InputError(f"{_of(path)} is damaged: {error}") from None
