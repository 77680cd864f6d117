"""Reading `quantization_config`: whose format it is and what it says about each module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import InputError
from ..patterns import fault
from .grid import Grid
from .module import ModuleScheme

__all__ = ["Grid", "ModuleScheme", "Rule", "Scheme", "read_scheme"]

_LONGEST_PATTERN = 500


@dataclass(frozen=True)
class Rule:
    """Modules that a target means (a name, "re:" and a pattern, or a class) and what they hold."""

    target: str
    scheme: ModuleScheme | None


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised. method: "compressed-tensors", "gptq" or "distaya".

    An exact name wins over a pattern and a pattern over a class ("Linear", "Embedding"), and among
    equals the first; what `ignore` means is stored dense.
    """

    method: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    _patterns: dict[str, re.Pattern] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _exact(self) -> dict[str, ModuleScheme | None]:
        return {rule.target: rule.scheme for rule in reversed(self.rules)}

    def for_module(self, name: str, is_embedding: bool = False) -> ModuleScheme | None:
        """What the file holds for a Linear (or embedding), None when it is stored dense."""
        kind = "Embedding" if is_embedding else "Linear"
        if any(target in (name, kind) or self._matches(target, name) for target in self.ignore):
            return None
        if name in self._exact:
            return self._exact[name]
        for rule in self.rules:
            if self._matches(rule.target, name):
                return rule.scheme
        return self._exact.get(kind)

    def _matches(self, target: str, name: str) -> bool:
        if not target.startswith("re:"):
            return False
        if target not in self._patterns:
            self._patterns[target] = re.compile(target[3:])
        return self._patterns[target].match(name) is not None


def read_scheme(config: Mapping[str, Any], where: str = "config.json") -> Scheme | None:
    """The scheme in a model's config (the parsed config.json), or None when it is not quantised.

    InputError in one sentence for a method, version or option that we do not read, for two
    quantisations at once, and for anything of a wrong type.
    """
    from . import compressed, gptq, own

    if config.get("compression_config") is not None:
        also = " beside a quantization_config" if config.get("quantization_config") else ""
        raise InputError(f"{where} has a compression_config{also}, an old form that is not read")
    about = config.get("quantization_config")
    if about is None:
        return None
    if not isinstance(about, Mapping):
        raise InputError(
            f"quantization_config of {where} must be a mapping, not {type(about).__name__}"
        )
    readers = {"compressed-tensors": compressed.read, "gptq": gptq.read, "distaya": own.read}
    method = about.get("quant_method")
    method = getattr(method, "value", method)  # transformers makes it an enum
    if not isinstance(method, str) or method not in readers:
        raise InputError(
            f"{where} is quantised by {method!r}; only {', '.join(readers)} can be read"
        )
    others = {"config_groups": "compressed-tensors", "modules": "distaya", "bits": "gptq"}
    for key, owner in others.items():
        if key in about and owner != method:
            raise InputError(
                f"quantization_config of {where} claims to be {method} and has {key} of {owner}"
            )
    return readers[method](about, where)


def check_pattern(target: str, where: str) -> str:
    """The target, InputError when it is no string or a pattern that is broken or could run long."""
    if not isinstance(target, str):
        raise InputError(f"{where} names a module by {target!r}, which is no text")
    if not target.startswith("re:"):
        return target
    pattern = target[3:]
    if found := fault(pattern, _LONGEST_PATTERN):
        raise InputError(f"the pattern {pattern[:60]!r} of {where} {found}")
    return target


def take(about: Mapping[str, Any], key: str, kinds: type | tuple, default: Any, where: str) -> Any:
    """about[key] (or the default), InputError when it has another type. bool is no int."""
    value = about.get(key, default)
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join("null" if k is type(None) else k.__name__ for k in wanted)
        raise InputError(f"{key} of {where} is {str(value)[:60]!r}; it must be {names}")
    return value


def check_size(bits: int, group: int, allowed: tuple[int, ...], where: str) -> None:
    """InputError unless a kernel exists for the bits and the group."""
    if bits not in allowed:
        raise InputError(
            f"{where} has {bits} bits; {' and '.join(map(str, allowed))} bits can be read"
        )
    if group not in (0, 32, 64, 128):
        raise InputError(f"{where} has groups of {group}; 32, 64, 128 or whole rows can be read")
