"""The rows of ours: what this build of distaya_ext can do, and one of them made and loaded back.

The only file of the quality bench that imports the extension.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.plain import Drawn
from bench.quality_rows import Row


@dataclass(frozen=True)
class Options:
    """What all rows share: the grids, and the model they start from."""

    model: str
    group: int
    symmetric: bool


@dataclass(frozen=True)
class Made:
    """A compressed model, the seconds of compress() with all it reads and writes, its size.

    bits: per weight of the Linears compressed, as the files have them.
    """

    model: Any
    seconds: float
    bits: float


def missing(row: Row) -> str | None:
    """Why this build cannot make the row, in a few words; None when it can."""
    try:
        from distaya_ext import recipe
    except ImportError as error:
        return f"distaya_ext does not import ({error})"
    if row.kind == "search":
        try:
            from distaya_ext.search import Options, search  # noqa: F401
        except ImportError as error:
            return f"no search in distaya_ext ({error})"
        return None
    if row.kind not in recipe.METHODS:
        return f"no method {row.kind} in distaya_ext"
    if row.update and "dass" not in recipe.Recipe.model_fields:
        return "recipes have no field dass"
    if row.quality in ("default", "high") and "quality" not in recipe.Recipe.model_fields:
        return "recipes have no field quality"
    return None


def recipe_of(row: Row, options: Options):
    """The Recipe of a row that is not a search."""
    from distaya_ext import Recipe

    p = row.pattern
    fields: dict[str, Any] = {"model": options.model, "method": row.kind}
    if p.nm:
        fields["nm"] = "{}:{}".format(*p.nm)
    elif p.sparsity:
        fields["sparsity"] = p.sparsity
    if p.bits:  # codes and bitmasks as small as we can store them
        fields |= {"bits": p.bits, "group": options.group, "symmetric": options.symmetric}
        fields["format"] = "distaya"
    if row.quality and "quality" in Recipe.model_fields:
        fields["quality"] = row.quality
    if row.permute:
        fields["permute"] = True
    if row.update:
        fields["dass"] = {"update": True}
    if row.mlp_only:
        fields["skip"] = ["self_attn"]
    return Recipe(**fields)


def compress_once(
    row: Row, drawn: Drawn, options: Options, out: Path, bits: float | None = None
) -> tuple[float, Any]:
    """Make the folder `out`: the seconds it took (a search with its own), and the report.

    bits: per weight, the budget of a search.
    """
    from distaya_ext import compress

    began = time.perf_counter()
    made = searched(drawn, options, bits) if row.kind == "search" else recipe_of(row, options)
    report = compress(options.model, out, made, texts=drawn)
    return time.perf_counter() - began, report


def searched(drawn: Drawn, options: Options, bits: float):
    """The recipe that a search finds for so many bits per weight.

    It sees the calibration windows of the other rows and no text beyond them: those that weigh its
    choices are taken out of them.
    """
    from distaya_ext.search import Options as Wanted
    from distaya_ext.search import search

    wanted = Wanted(bits_per_weight=bits, group=options.group, symmetric=options.symmetric)
    return search(options.model, drawn, wanted).recipe


def make(row: Row, drawn: Drawn, options: Options, bits: float | None = None) -> Made:
    """Compress through the extension's driver and load what it wrote, activations exact.

    bits: see compress_once.
    """
    import torch

    from distaya_ext import load

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compressed"
        seconds, report = compress_once(row, drawn, options, out, bits)
        model = load(out, dtype=torch.float32, exact=True)
    return Made(model, seconds, report.bits_per_weight)


def version() -> str:
    """Of the code that rows of ours depend on: sha256 of its files, 16 hex digits."""
    import distaya_ext

    root = Path(distaya_ext.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".so")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
