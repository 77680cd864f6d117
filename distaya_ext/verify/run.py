"""verify(): whether a model folder is what it says it is."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint, check_finite, open_checkpoint
from ..checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, locate
from ..checkpoint.reader import read_header
from ..compress.fallbacks import Fallbacks
from ..errors import DistayaError, InputError
from . import files, weights
from .findings import Findings
from .plan import expectations


def verify(folder: str | Path, *, quick: bool = False, offline: bool = False) -> Findings:
    """Look at everything in a model folder (or hub id): ours, pack-quantized, GPTQ or dense.

    With a manifest: missing, extra and changed files. Always: shards and index, headers against the
    architecture of config.json, tokenizer against embedding, adapter; every float and scale finite,
    codes and zeros in range, reserved bits 0, masks that fit their codes, tied ends equal; where
    layers.csv tells of them, N:M patterns, sparsity and bits of each matrix.

    quick   sizes instead of hashes, and no weight is read

    One matrix is in memory at a time. Nothing is written and no code of the folder is run.
    InputError when there is no such folder; whatever is wrong with it is in what is returned.
    """
    place = locate(folder, offline=offline)
    found = Findings(place.name, quick=quick)
    files.check_manifest(place, found)
    files.check_readable(place, found)
    if (place / ADAPTER_CONFIG).is_file() and not (place / "config.json").is_file():
        _check_adapter_alone(place, found)
        return found
    try:
        checkpoint = open_checkpoint(place, packed=True)
    except InputError as error:
        found.add("structure", place.name, str(error))
        return found
    found.looked["headers"] += len(checkpoint.entries)
    files.check_total(place, checkpoint.nbytes, found)
    _check_tokenizer(checkpoint, found)
    _check_adapter(checkpoint, found)
    told = Fallbacks.told(place)
    if told is not None and not told.startswith("0 of"):
        found.notes.append(f"the run that made it says: {told}")
    plan = expectations(place, checkpoint.linears(), found)
    if not quick:
        weights.check_packed(checkpoint, plan, found)
        weights.check_dense(checkpoint, plan, found)
        if not plan:
            found.notes.append("there is no layers.csv: no pattern or sparsity was promised")
    return found


def _check_tokenizer(checkpoint: Checkpoint, found: Findings) -> None:
    from ..tokenizer import VOCABULARY_FILES, load_tokenizer

    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        found.notes.append("there is no tokenizer")
        return
    found.looked["tokenizer"] += 1
    try:
        load_tokenizer(folder, checkpoint.config.vocab_size)
    except InputError as error:
        found.add("tokenizer", folder.name, str(error))


def _check_adapter(checkpoint: Checkpoint, found: Findings) -> None:
    if checkpoint.adapter is None:
        return
    from ..train.adapter import read_adapter

    found.looked["adapter"] += 1
    try:
        read_adapter(checkpoint.adapter, checkpoint)
    except DistayaError as error:
        found.add("adapter", checkpoint.adapter.name, str(error))


def _check_adapter_alone(folder: Path, found: Findings) -> None:
    """An adapter without its model: its tensors are finite."""
    from safetensors import safe_open

    found.looked["adapter"] += 1
    path = folder / ADAPTER_WEIGHTS
    try:
        entries = read_header(path)
    except InputError as error:
        found.add("adapter", path.name, str(error))
        return
    with safe_open(path, framework="pt") as file:
        for name in entries:
            try:
                check_finite(name, file.get_tensor(name))
            except InputError as error:
                found.add("finite", path.name, str(error))
    found.notes.append("an adapter alone: whether it fits a model is seen when it is merged")
