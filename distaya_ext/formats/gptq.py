"""quantization_config of GPTQ checkpoints (AutoGPTQ, GPTQModel and their readers)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .module import ModuleScheme
from .scheme import Rule, Scheme, check_pattern, check_size, take

BITS = (4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is subtracted from stored zeros
_OVERRIDES = {"bits", "group_size", "sym", "desc_act"}


def read(about: Mapping[str, Any], where: str) -> Scheme:
    """Scheme of a GPTQ config. All Linears of the decoder are quantised, lm_head where it says so;
    `dynamic` may leave modules out ("-:pattern") or change their bits, group and symmetry.
    """
    where = f"quantization_config of {where}"
    form = take(about, "checkpoint_format", (str, type(None)), None, where) or "gptq"
    if form not in _FORMATS:
        raise InputError(
            f"{where} has the checkpoint_format {form!r}; {' and '.join(_FORMATS)} can be read"
        )
    if about.get("is_marlin_format"):
        raise InputError(f"{where} has the marlin format, which only one kernel reads")
    base = _scheme(about, _FORMATS[form], where)
    rules = []
    for pattern, change in (take(about, "dynamic", (dict, type(None)), None, where) or {}).items():
        rules.append(_override(pattern, change, about, _FORMATS[form], f"dynamic of {where}"))
    rules += _named(about, base, where)
    head = take(about, "lm_head", (bool, type(None)), False, where)
    return Scheme("gptq", tuple(rules), () if head else ("lm_head",))


def _scheme(about: Mapping[str, Any], offset: int, where: str) -> ModuleScheme:
    bits = take(about, "bits", int, None, where)
    size = take(about, "group_size", int, 128, where)
    take(about, "desc_act", bool, False, where)  # the order itself is checked in every g_idx
    group = 0 if size == -1 else size or -1
    check_size(bits, group, BITS, where)
    symmetric = take(about, "sym", bool, True, where)
    kind = "int8" if bits == 8 else None
    return ModuleScheme(bits, group, symmetric, "gptq", kind=kind, offset=offset)


def _override(pattern: str, change: Any, about: Mapping[str, Any], offset: int, where: str) -> Rule:
    if not isinstance(change, Mapping):
        raise InputError(f"{where} gives {str(change)[:60]!r} for {pattern[:60]!r}; no mapping")
    target = check_pattern("re:" + pattern.removeprefix("+:").removeprefix("-:"), where)
    if pattern.startswith("-:"):
        return Rule(target, None)
    if unknown := sorted(map(str, set(change) - _OVERRIDES)):
        raise InputError(f"{where} has the unknown option {unknown[0]!r}")
    return Rule(target, _scheme({**about, **change}, offset, where))


def _named(about: Mapping[str, Any], base: ModuleScheme, where: str) -> list[Rule]:
    """All Linears, or those listed in modules_in_block_to_quantize (lists of names in a layer)."""
    listed = take(about, "modules_in_block_to_quantize", (list, type(None)), None, where)
    if not listed:
        return [Rule("Linear", base)]
    names = [n for part in listed for n in (part if isinstance(part, list) else [part])]
    where = f"modules_in_block_to_quantize of {where}"
    rules = []
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{where} names a module by {name!r}, which is no text")
        rules.append(Rule(check_pattern(f"re:.*\\.{re.escape(name)}$", where), base))
    return rules


def expresses(scheme: ModuleScheme, rows: int, cols: int) -> bool:
    """Whether the format can say it: 4 or 8 bits, whole groups, rows and columns in whole words."""
    per_word = 32 // scheme.bits if scheme.bits in BITS else 0
    fits = scheme.group == 0 or cols % scheme.group == 0
    return bool(per_word) and fits and rows % per_word == 0 and cols % per_word == 0


def write(modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any]:
    """quantization_config for modules that are all of the same scheme but for their group, and the
    Linears of the decoder that stay dense (`ignore`; lm_head is left out anyway).
    """
    base = max(modules.values(), key=lambda s: (list(modules.values()).count(s), s.group))
    dynamic: dict[str, Any] = {
        f"-:{re.escape(name)}$": {} for name in sorted(ignore) if name != "lm_head"
    }
    for name, scheme in modules.items():
        if scheme != base:
            dynamic[f"+:{re.escape(name)}$"] = {
                "bits": scheme.bits,
                "group_size": scheme.group or -1,
                "sym": scheme.symmetric,
            }
    found = {
        "quant_method": "gptq",
        "bits": base.bits,
        "group_size": base.group or -1,
        "desc_act": False,
        "sym": base.symmetric,
        "lm_head": "lm_head" in modules,
        "checkpoint_format": "gptq" if base.offset else "gptq_v2",
    }
    return {**found, "dynamic": dynamic} if dynamic else found
