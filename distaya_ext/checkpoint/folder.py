"""Finding a model folder and the files in it, without trusting the names written inside."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line
from ..models import describe

# What is fetched from a hub: weights, configuration, tokenizer, licence. Never code, never pickles.
_FETCH = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "README*",
]
_SKIP = ["*/*", "consolidated*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MOST_JSON = 64 << 20  # bytes; the index of a model of a trillion weights has a tenth of it
_MOST_NAME = 255  # bytes that a file system takes
_ATTENTION = ("attn_implementation", "experts_implementation", "_implementation_internal")
_KNOWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")
# transformers takes null for these and falls only in the first forward.
_NUMBERS = ("layer_norm_eps", "rms_norm_eps", "logit_scale")
# LoRA that belongs to the model and stays beside its quantised weights, as PEFT writes it.
ADAPTER = "adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as A; '
    "A.from_pretrained('MODEL').save_pretrained('OUT')\""
)


def locate(model: str | Path, *, offline: bool = False) -> Path:
    """Folder of a model given as a local path or as a hub id `owner/name`.

    offline (or HF_HUB_OFFLINE=1) uses the local hub cache only. Raises InputError when nothing is
    there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"{model} is a file; a model is a folder with config.json and .safetensors files"
        )
    parts = str(model).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise InputError(
            f"{model} is neither an existing folder nor a hub id of the form owner/name"
        )
    return _download(str(model), offline)


def _download(repo: str, offline: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    local = offline or constants.HF_HUB_OFFLINE
    try:
        beside = [f"{ADAPTER}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        snapshot_download(repo, allow_patterns=beside, local_files_only=local)
        return Path(
            snapshot_download(
                repo, allow_patterns=_FETCH, ignore_patterns=_SKIP, local_files_only=local
            )
        )
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        how = "in the local hub cache (offline)" if local else "on the hub"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{repo} is no local folder and could not be read {how}: {reason}"
        ) from error


def adapter_of(folder: Path) -> Path | None:
    """The folder of the adapter that belongs to a model folder, or None."""
    beside = folder / ADAPTER
    held = any((beside / name).exists() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return beside if held else None


def contained(folder: Path, name: str) -> Path:
    """Path of file `name` of the folder, refused when the name or a link leads out of it.

    Only plain file names are accepted. A link may leave the folder only into the blobs folder of
    the same hub cache entry (models--*/snapshots/REV/file -> models--*/blobs/HASH).
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(
            f"file name {name!r} in the model leads out of its folder; only plain names are read"
        )
    if len(os.fsencode(name)) > _MOST_NAME:
        raise InputError(
            f"file name {name[:60]!r}... in the model has {len(name)} characters; no file has such "
            "a name"
        )
    root = folder.resolve()
    try:
        target = (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise InputError(f"{name} is a link that leads nowhere: {one_line(error)}") from None
    above = [p.parent for p in (root, root.parent) if p.parent.name == "snapshots"]
    cache_blobs = above[0].parent / "blobs" if above else None
    if target.parent != root and target.parent != cache_blobs:
        raise InputError(
            f"{name} is a link that leaves the model folder (to {target.name}); it is not followed"
        )
    return folder / name


def read_json(folder: Path, name: str) -> dict:
    """Parsed JSON object of a file in the folder; InputError when missing, not UTF-8 JSON or no
    object.
    """
    path = contained(folder, name)
    if not path.is_file():
        raise InputError(f"the model folder {folder.name} has no {name}")
    if (size := path.stat().st_size) > _MOST_JSON:
        raise InputError(
            f"{name} of {folder.name} has {size} bytes; more than {_MOST_JSON} no such file has"
        )
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise InputError(f"{name} of {folder.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{name} of {folder.name} must hold a JSON object, not {type(value).__name__}"
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict:
    """An object of JSON; a key given twice would let two readers see two different models."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:60]!r} is given twice")
    return found


def read_config(folder: Path, *, packed: bool = False) -> dict:
    """config.json of a model we may run: known model_type, no code of its own, and not quantised
    already unless packed=True.
    """
    if not any(folder.iterdir()):
        raise InputError(f"the model folder {folder.name} is empty")
    config = read_json(folder, "config.json")
    _check_code(folder, config)
    describe(config)
    for name in _NUMBERS:
        if not isinstance(config.get(name, 0.0), (int, float)):
            raise InputError(f"config.json gives {config[name]!r} for {name}; it must be a number")
    about = config.get("quantization_config")
    if about is not None and not packed:
        method = about.get("quant_method", "unknown") if isinstance(about, dict) else "unknown"
        raise InputError(
            f"the model is already quantised ({method}); start from its bf16 or fp32 weights"
        )
    return config


def _check_code(folder: Path, config: dict) -> None:
    """Refuse what makes transformers fetch code, or weights that nobody has looked at.

    Under attn_implementation: owner/name it downloads and loads a compiled kernel; an adapter whose
    config lies in the folder it attaches to whatever it loads.
    """
    files = {"config.json": config}
    if (folder / "tokenizer_config.json").is_file():
        files["tokenizer_config.json"] = read_json(folder, "tokenizer_config.json")
    for name, held in files.items():
        if "auto_map" in held:
            raise InputError(
                f"{name} asks for code of its own (auto_map); remote code is never run, "
                "use a checkpoint whose model_type transformers knows"
            )
    for key, value in config.items():
        if key.endswith(_ATTENTION) and value not in _KNOWN_ATTENTION:
            raise InputError(
                f"config.json asks for {key} {str(value)[:80]!r}, which may be code from "
                f"elsewhere; none but {', '.join(_KNOWN_ATTENTION[1:])} is read, take the line out"
            )
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{folder.name} has {ADAPTER_CONFIG} beside its config.json, so that other readers "
            "attach LoRA to it unasked; move the adapter to its own folder and distaya merge it"
        )


def read_index(folder: Path) -> dict[str, Path]:
    """Map tensor name -> shard path from the index, or {} when one model.safetensors holds
    everything.

    Raises InputError for names that leave the folder, pickled weights, and all missing shards at
    once.
    """
    single = contained(folder, "model.safetensors")
    if single.is_file():
        return {}
    if not (folder / "model.safetensors.index.json").is_file():
        raise _no_weights(folder)
    index = read_json(folder, "model.safetensors.index.json")  # its "metadata" is optional
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("model.safetensors.index.json has no weight_map")
    if bad := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise InputError(f"weight_map of model.safetensors.index.json names no file for {bad[0]}")
    if bad := sorted({s for s in weight_map.values() if not s.endswith(".safetensors")}):
        raise InputError(
            f"the index names {bad[0]!r}, which is no .safetensors file; pickles are not read"
        )
    paths = {shard: contained(folder, shard) for shard in sorted(set(weight_map.values()))}
    if missing := [shard for shard, path in paths.items() if not path.is_file()]:
        raise InputError(f"{len(missing)} of {len(paths)} shards are missing: {', '.join(missing)}")
    return {name: paths[shard] for name, shard in weight_map.items()}


def _no_weights(folder: Path) -> InputError:
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return InputError(
            f"{folder.name} has {len(shards)} .safetensors files but neither model.safetensors "
            "nor model.safetensors.index.json"
        )
    for pattern in _PICKLES:
        if found := sorted(folder.glob(pattern)):
            return InputError(
                f"{folder.name} has only pickled weights ({found[0].name}), which can run code "
                f"when "
                f"loaded and are refused; convert them where you trust them: {_CONVERT}"
            )
    return InputError(f"{folder.name} has no .safetensors weights")
