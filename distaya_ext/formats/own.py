"""quant_method distaya, version 1: every module by its name. docs/format.md specifies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..packed import KINDS
from .module import ModuleScheme
from .scheme import Rule, Scheme, check_size, take

VERSION = 1
BITS = (3, 4, 8)
_KEYS = {"quant_method", "version", "modules"}
_MODULE_KEYS = {"bits", "group", "symmetric", "encoding", "kind", "nm"}


def read(about: Mapping[str, Any], where: str) -> Scheme:
    """Scheme of a config of ours. InputError for another version and for unknown keys."""
    where = f"quantization_config of {where}"
    version = about.get("version")
    if version != VERSION or isinstance(version, bool):
        raise InputError(
            f"{where} has version {str(version)[:40]!r}; this release reads version {VERSION}"
        )
    if unknown := sorted(map(str, set(about) - _KEYS)):
        raise InputError(f"{where} has the unknown key {unknown[0][:60]!r}")
    modules = take(about, "modules", dict, {}, where)
    if not modules:
        raise InputError(f"{where} names no modules")
    rules = [
        Rule(name, _module(entry, f"{name[:80]} in {where}")) for name, entry in modules.items()
    ]
    return Scheme("distaya", tuple(rules))


def _module(entry: Any, where: str) -> ModuleScheme:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} must be a mapping, not {type(entry).__name__}")
    if unknown := sorted(map(str, set(entry) - _MODULE_KEYS)):
        raise InputError(f"{where} has the unknown key {unknown[0][:60]!r}")
    bits = take(entry, "bits", int, None, where)
    group = take(entry, "group", int, None, where)
    check_size(bits, group, BITS, where)
    encoding = take(entry, "encoding", str, "pack-quantized", where)
    if encoding not in ("pack-quantized", "bitmask"):
        raise InputError(f"{where} has the encoding {encoding!r}; pack-quantized and bitmask exist")
    if encoding == "bitmask" and bits != 4:
        raise InputError(f"{where} is a bitmask of {bits} bits; a bitmask has 4")
    kind = take(entry, "kind", (str, type(None)), None, where)
    if kind is not None and (kind not in KINDS or int(kind[3]) != bits):
        raise InputError(f"{where} has the kind {kind!r}, which is none for {bits} bits")
    kind = kind or {3: "int3", 8: "int8"}.get(bits)  # 4 bits: the best for the codes, when loading
    nm = _nm(take(entry, "nm", (list, type(None)), None, where), kind, where)
    symmetric = take(entry, "symmetric", bool, None, where)
    return ModuleScheme(bits, group, symmetric, encoding, kind, nm)


def _nm(pair: list | None, kind: str | None, where: str) -> tuple[int, int] | None:
    if (pair is not None) != (kind == "int4-out"):
        raise InputError(f"{where} has nm {pair!r} and kind {kind!r}; nm belongs to int4-out")
    if pair is None:
        return None
    if len(pair) != 2 or not all(type(x) is int for x in pair):
        raise InputError(f"{where} has nm {str(pair)[:60]!r}; two whole numbers are needed")
    n, m = pair
    if m not in (2, 4, 8, 16) or not 0 < n < m:
        raise InputError(f"{where} has nm {n}:{m}; 0 < n < m and m of 2, 4, 8 or 16 are needed")
    return n, m


def write(modules: Mapping[str, ModuleScheme]) -> dict[str, Any]:
    """quantization_config for the modules by name."""
    return {
        "quant_method": "distaya",
        "version": VERSION,
        "modules": {name: entry(scheme) for name, scheme in modules.items()},
    }


def entry(scheme: ModuleScheme) -> dict[str, Any]:
    """One module of the config."""
    found: dict[str, Any] = {
        "bits": scheme.bits,
        "group": scheme.group,
        "symmetric": scheme.symmetric,
        "encoding": scheme.encoding,
        "kind": scheme.kind,
    }
    return found if scheme.nm is None else {**found, "nm": list(scheme.nm)}
