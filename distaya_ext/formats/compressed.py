"""quantization_config of compressed-tensors, format pack-quantized: reading anyone's, writing ours.

What we write loads in stock transformers with the compressed-tensors package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .module import ModuleScheme
from .scheme import Rule, Scheme, check_pattern, check_size, take

BITS = (4, 8)
ASYMMETRIC = (  # measured with transformers 5.23 and compressed-tensors 0.20
    "asymmetric pack-quantized weights load here, but in transformers only with "
    "CompressedTensorsConfig(dequantize=True)"
)
_FORMAT = "pack-quantized"
_STATUSES = ("compressed", "frozen")  # frozen: what the first versions wrote
_UNUSED = ("kv_cache_scheme", "moe_sparsity_config", "transform_config", "sparsity_config")
_ARGS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic",
    "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


def read(about: Mapping[str, Any], where: str) -> Scheme:
    """Scheme of a compressed-tensors config. InputError for what is not 4 or 8 bit pack-quantized
    weights.
    """
    where = f"quantization_config of {where}"
    if "version" in about and not isinstance(about["version"], str):
        raise InputError(f"version of {where} is {about['version']!r}; a text is expected")
    form = take(about, "format", str, "", where)
    if form not in (_FORMAT, "mixed-precision"):
        raise InputError(f"{where} has the format {form!r}; only {_FORMAT} can be read")
    status = take(about, "quantization_status", str, "compressed", where)
    if status not in _STATUSES:
        raise InputError(f"{where} says the weights are {status!r}; they must be compressed")
    for key in _UNUSED:
        value = about.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise InputError(f"{where} uses {key}, which is not supported")
    given = take(about, "config_groups", dict, {}, where)
    if not given:
        raise InputError(f"{where} has no config_groups")
    rules = []
    for name, group in given.items():
        rules += _group(group, f"{name} of {where}")
    ignore = take(about, "ignore", (list, type(None)), [], where) or []
    ignored = tuple(check_pattern(target, f"ignore of {where}") for target in ignore)
    return Scheme("compressed-tensors", tuple(rules), ignored)


def _group(group: Any, where: str) -> list[Rule]:
    if not isinstance(group, Mapping):
        raise InputError(f"{where} must be a mapping, not {type(group).__name__}")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise InputError(f"{where} quantises {key}; only weights can be")
    if group.get("format") not in (None, _FORMAT):
        raise InputError(f"{where} has the format {group['format']!r}; only {_FORMAT} can be read")
    scheme = _weights(take(group, "weights", dict, None, where), f"weights of {where}")
    targets = take(group, "targets", list, [], where)
    if not targets:
        raise InputError(f"{where} has no targets")
    return [Rule(check_pattern(target, f"targets of {where}"), scheme) for target in targets]


def _weights(args: Mapping[str, Any], where: str) -> ModuleScheme:
    if unknown := sorted(map(str, set(args) - _ARGS)):
        raise InputError(f"{where} have the unknown option {unknown[0]!r}")
    kind = take(args, "type", str, "int", where)
    if kind.lower() != "int":
        raise InputError(f"{where} are of type {kind!r}; only int can be read")
    if args.get("dynamic") not in (None, False) or args.get("block_structure") is not None:
        raise InputError(f"{where} are dynamic or in blocks, which is not supported")
    order = take(args, "actorder", (str, bool, type(None)), None, where)
    order = order.lower() if isinstance(order, str) else order
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        raise InputError(f"{where} have the unknown actorder {order!r}")
    size = take(args, "group_size", (int, type(None)), None, where)
    grouped = size is not None and size > 0
    implied = "group" if grouped else "channel" if size == -1 else "tensor"
    strategy = take(args, "strategy", (str, type(None)), None, where) or implied
    if strategy.lower() not in ("group", "channel"):
        raise InputError(f"{where} have the strategy {strategy!r}; group and channel can be read")
    by_group = strategy.lower() == "group"
    if by_group != grouped:
        raise InputError(f"{where} have the strategy {strategy!r} and the group_size {size}")
    bits = take(args, "num_bits", int, 8, where)
    group = size if by_group else 0
    check_size(bits, group, BITS, where)
    symmetric = take(args, "symmetric", bool, True, where)
    indexed = by_group and order in ("group", "dynamic")
    kind = "int8" if bits == 8 else None
    return ModuleScheme(bits, group, symmetric, kind=kind, indexed=indexed)


def expresses(scheme: ModuleScheme, cols: int) -> bool:
    """Whether the format can say it: 4 or 8 bits, no bitmask, whole groups only."""
    fits = scheme.group == 0 or cols % scheme.group == 0
    return scheme.bits in BITS and scheme.encoding == _FORMAT and fits


def write(modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any]:
    """quantization_config for the modules by name; ignore: the Linears that are stored dense.

    One scheme for all is said by the class Linear and the list of exceptions, several by names.
    """
    schemes = sorted(set(modules.values()), key=lambda s: (s.bits, s.group, s.symmetric))
    several = len(schemes) > 1
    config_groups = {}
    for index, scheme in enumerate(schemes):
        names = [name for name, its in modules.items() if its == scheme]
        config_groups[f"group_{index}"] = {
            "targets": names if several else ["Linear"],
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group else "channel",
                "group_size": scheme.group or None,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(ignore),
        "config_groups": config_groups,
    }
