"""What the commands add to the history of runs (distaya_ext.history)."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import one_line
from ..history import add, file
from . import ranked

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..measure.model import ModelResult, Setting
    from ..search import Found
    from ..train.publish import Trained

_DIGITS = 12  # of a fingerprint
_BLOCKS, _BLOCK = 64, 4096  # of a file, spread evenly: who differs there is another file
_PLACES = {"model", "path", "teacher", "max_ram"}  # fields of a recipe that decide no weight


def _never_fails(remember: Callable[..., None]) -> Callable[..., None]:
    """Nothing where the history is off or another rank remembers; a note, and no error, where a
    file cannot be read.
    """

    @functools.wraps(remember)
    def guarded(*args: Any) -> None:
        if file() is None or not ranked.speaks():
            return
        try:
            remember(*args)
        except (OSError, ValueError, LookupError, TypeError) as error:
            typer.echo(f"note: this run is not in the history: {one_line(error)}", err=True)

    return guarded


@_never_fails
def evaluated(found: Evaluation, model: str, against: str | None, texts: Path, how: str) -> None:
    """After `distaya eval`; how says in words what else two runs must share."""
    _add(
        command="eval",
        **_model(model, against),
        texts=_texts(texts),
        setting=how,
        seconds=found.seconds,
        languages=_languages(found.to_dict()["languages"]),
    )


@_never_fails
def compressed(out: Path, model: str, summary: dict[str, Any], texts: Iterable[Any]) -> None:
    """After `distaya compress`, of a chain with what its last evaluation found."""
    evaluations = list(summary.get("evaluations", {}).values())
    steps = [step["seconds"] for step in summary.get("steps", [])]
    _add(
        command="compress",
        **_model(str(out), model),
        texts=_texts(*(Path(folder) for folder in texts if folder is not None)),
        setting=None,
        seconds=sum(steps) if steps else summary["totals"]["seconds"],
        languages=_languages(evaluations[-1]["languages"]) if evaluations else {},
    )


@_never_fails
def benched(result: ModelResult, model: str, against: str | None, s: Setting) -> None:
    """After `distaya bench model`. A contended run has no speed worth remembering."""
    from ..measure.clock import machine

    row = result.rows[0]
    where = f"{machine().get('cpu', '')} {s.device}, {row.threads} threads, {s.dtype}"
    exact = ", exact" if s.exact else ""
    _add(
        command="bench model",
        **_model(model, against),
        texts=None,
        setting=f"{row.prompt} + {row.new} tokens on {where}{exact}",
        seconds=None,
        tokens_per_second=None if row.contended else row.decode_rate,
    )


@_never_fails
def searched(found: Found, model: str, texts: Path) -> None:
    """After `distaya search`: what the recipe it found is expected to be."""
    best = found.best
    record = {
        "command": "search",
        **_model(model, None),
        "texts": _texts(texts),
        "setting": f"{found.budget['bytes']} bytes of {found.budget['of']}",
        "seconds": found.cost["seconds"],
        "languages": {lang: {"kl": kl} for lang, kl in best.kl_per_language.items()},
    }
    _add(**record | {"bytes": best.bytes, "bits_per_weight": best.bits_per_weight})


@_never_fails
def trained(found: Trained, command: str, base: str, texts: str) -> None:
    """After `distaya heal` or `distill`: nats per label of held-out text, by language."""
    after = {k: v for k, v in (found.record.get("after") or {}).items() if k != "all"}
    _add(
        command=command,
        **_model(str(found.out), base),
        texts=_texts(Path(texts)),
        setting=f"{found.course.steps} steps",
        seconds=found.course.seconds,
        languages={lang: {"nll": each["nll"]} for lang, each in after.items() if "nll" in each},
    )


def name_of(model: str | Path) -> str:
    """The last part of a path or hub id, and a fingerprint of its files."""
    folder = _folder(model)
    if folder is None:
        return f"{Path(str(model)).name}@unknown"
    local = Path(str(model))
    shown = local.resolve().name if local.exists() else local.name
    return f"{shown}@{_gist([*_weights(folder), folder / 'config.json'])}"


def _add(**record: Any) -> None:
    from .. import __version__

    if sentence := add({"version": __version__, "tokens_per_second": None, **record}):
        typer.echo(f"note: {sentence}", err=True)


def _model(model: str, base: str | None) -> dict[str, Any]:
    """Names, and what the folder of the model says of its size and recipe."""
    folder = _folder(model)
    base = base if base is not None else _made_from(folder)
    out: dict[str, Any] = {
        "model": name_of(model), "base": None if base is None else name_of(base),
        "recipe": None, "bytes": None, "bits_per_weight": None,
    }  # fmt: skip
    if folder is None:
        return out
    out["bytes"] = sum(path.stat().st_size for path in _weights(folder))
    if (folder / "recipe.yaml").is_file():
        out["recipe"] = _recipe(folder / "recipe.yaml")
    out["bits_per_weight"] = _bits(folder / "results.json")
    return out


def _weights(folder: Path) -> list[Path]:
    """Files of weights, those of an adapter beside them too."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")])


def _made_from(folder: Path | None) -> str | None:
    """The model that the recipe of a folder of ours names, where it is still there."""
    from ..recipe_file import read_fields

    if folder is None or not (folder / "recipe.yaml").is_file():
        return None
    try:
        named = read_fields(folder / "recipe.yaml").get("model")
    except (ValueError, OSError):
        return None
    return named if isinstance(named, str) and _folder(named) is not None else None


def _folder(model: str | Path) -> Path | None:
    from ..checkpoint import locate

    try:
        return locate(model, offline=True)
    except (ValueError, OSError):
        return None


def _bits(results: Path) -> float | None:
    try:
        return json.loads(results.read_text(encoding="utf-8"))["totals"]["bits_per_weight"] or None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _recipe(path: Path) -> str | None:
    from ..recipe_file import read_fields

    try:
        text = json.dumps(_without_places(read_fields(path)), sort_keys=True)
    except (ValueError, OSError, TypeError):
        return None
    return hashlib.blake2b(text.encode(), digest_size=_DIGITS // 2).hexdigest()


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_places(v) for k, v in value.items() if k not in _PLACES}
    return value


def _texts(*folders: Path) -> str | None:
    from ..documents import SUFFIXES

    inside = [[f] if f.is_file() else sorted(f.iterdir()) for f in folders]
    files = [p for found in inside for p in found if p.suffix in SUFFIXES]
    return _gist(files) if files else None


def _gist(files: Iterable[Path]) -> str:
    """A fingerprint of files from their names, sizes and blocks spread over each: a model of
    sixteen gigabytes costs milliseconds.
    """
    made = hashlib.blake2b(digest_size=_DIGITS // 2)
    for path in files:
        size = path.stat().st_size
        made.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for at in sorted({size * i // _BLOCKS for i in range(_BLOCKS)}):
                file.seek(at)
                made.update(file.read(_BLOCK))
    return made.hexdigest()


def _languages(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = ("nll", "dnll", "dnll_interval", "ppl_ratio", "kl", "wrong_script")
    return {row["language"]: {key: row.get(key) for key in keys} for row in rows}
