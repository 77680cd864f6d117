"""The tensors of a checkpoint against the model of its config and what is said to be quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import InputError
from ..formats import ModuleScheme, Scheme
from ..models import Architecture
from .entry import FLOATS, Entry, shape_text, some


@dataclass(frozen=True)
class Stored:
    """A quantised matrix [rows, cols] of the checkpoint."""

    scheme: ModuleScheme
    rows: int
    cols: int


def stored_modules(
    skeleton: nn.Module, architecture: Architecture, scheme: Scheme | None, tied: bool
) -> dict[str, Stored]:
    """Quantised modules by name. InputError when the config names one that the model has not.

    A tied head is the embedding and holds nothing of its own.
    """
    if scheme is None:
        return {}
    found: dict[str, Stored] = {}
    for name, module in skeleton.named_modules():
        is_embedding = isinstance(module, nn.Embedding)
        if not (is_embedding or isinstance(module, nn.Linear)):
            continue
        held = scheme.for_module(name, is_embedding)
        if held is not None and not (tied and name == architecture.head):
            found[name] = Stored(held, *module.weight.shape)
    if scheme.method == "distaya":
        lost = [rule.target for rule in scheme.rules if rule.target not in found]
        if lost:
            raise InputError(
                f"quantization_config names {lost[0][:80]}, which is no matrix of this model"
            )
    if not found:
        raise InputError(
            "config.json has a quantization_config that quantises no matrix of this model"
        )
    return found


def compare(
    expected: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, Entry],
    stored: Mapping[str, Stored],
    tied: bool,
) -> list[str]:
    """Refuse missing, unexpected, misshapen and wrongly typed tensors, naming the first few.

    Returns the biases that GPTQ modules may have although the model has none; they must be 0.
    """
    parts = _check_stored(entries, stored, expected)
    expected = {k: v for k, v in expected.items() if k.removesuffix(".weight") not in stored}
    optional = {"lm_head.weight"} if tied else set()
    if missing := [name for name in expected if name not in entries and name not in optional]:
        raise InputError(f"the checkpoint lacks {some(missing)}, which config.json asks for")
    extra = [name for name in entries if name not in expected and name not in parts]
    unused = [name for name in extra if _is_spare_bias(name, entries[name], stored)]
    if extra := [name for name in extra if name not in unused]:
        raise InputError(
            f"the checkpoint holds {some(extra)}, which the model of config.json has not"
        )
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            continue
        if entry.shape != shape:
            raise InputError(
                f"tensor {name} has shape {shape_text(entry.shape)}; config.json asks for "
                f"{shape_text(shape)}"
            )
        if entry.dtype not in FLOATS:
            raise InputError(
                f"tensor {name} is not stored as one of {', '.join(FLOATS.values())}; "
                "already quantised?"
            )
    return unused


def _check_stored(
    entries: Mapping[str, Entry], stored: Mapping[str, Stored], expected: Mapping[str, tuple]
) -> set[str]:
    """Names of all tensors of quantised modules, after a check of dtypes and shapes."""
    parts: set[str] = set()
    of_module: dict[str, dict[str, Entry]] = {name: {} for name in stored}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        if module in stored and suffix != "bias":
            of_module[module][suffix] = entry
            parts.add(name)
    for module, held in stored.items():
        found = of_module[module]
        if "weight" in found:
            both = " beside its packed tensors" if len(found) > 1 else ""
            raise InputError(
                f"{module} is quantised, but the checkpoint holds {module}.weight{both}"
            )
        headers = {suffix: (entry.dtype, entry.shape) for suffix, entry in found.items()}
        held.scheme.check(headers, held.rows, held.cols, module)
    return parts


def _is_spare_bias(name: str, entry: Entry, stored: Mapping[str, Stored]) -> bool:
    held = stored.get(name.removesuffix(".bias"))
    return (
        held is not None
        and held.scheme.encoding == "gptq"
        and entry.shape == (held.rows,)
        and entry.dtype in FLOATS
    )
