"""How much memory a run takes beside its activations, and how much that leaves for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import ResourceError, UsageError
from .calibrate import CHUNK_TOKENS

GIB = 1 << 30
MIB = 1 << 20
_INTERPRETER = 512 * MIB  # Python, torch and transformers themselves
_LEAST_SHARD = 64 * MIB  # weights held until a shard is written
_WHOLE_PROOF = 2 * GIB  # without a limit, models up to this size are proved against the whole model


class Budget:
    """Bytes for each purpose under a limit (None = no limit). UsageError when it is too small."""

    def __init__(self, checkpoint: Checkpoint, limit: int | None):
        least = least_bytes(checkpoint)
        if limit is not None and limit < least:
            raise UsageError(
                f"this model needs at least {least / GIB:.2f} GiB to be compressed "
                f"layer by layer; max_ram allows {limit / GIB:.2f} GiB"
            )
        self.shard_bytes = GIB if limit is None else min(GIB, _LEAST_SHARD + (limit - least) // 8)
        self.room = None if limit is None else limit - least - (self.shard_bytes - _LEAST_SHARD)
        # The proof against the whole model holds it once, and once more while it is loaded.
        self.proves_whole = checkpoint.nbytes <= (_WHOLE_PROOF if limit is None else self.room // 2)

    def spills(self, activation_bytes: int) -> bool:
        """Whether activations of that size must go to disk.

        Without a limit they may fill a quarter of the memory; the result is the same either way.
        """
        room = physical_bytes() // 4 if self.room is None else self.room
        return activation_bytes > room


def physical_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_disk(folder: Path, needed: int) -> None:
    """ResourceError when the disk that holds the result and spilled activations is too full."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"the run writes {needed / GIB:.2f} GiB beside the output folder "
            f"and only {free / GIB:.2f} GiB are free there"
        )


def least_bytes(checkpoint: Checkpoint) -> int:
    """The smallest limit under which the model can be compressed.

    The embedding is read, proved with and copied before the first layer, so only the larger counts.
    """
    embed = checkpoint.entries[f"{checkpoint.architecture.embed}.weight"].nbytes
    return _INTERPRETER + _LEAST_SHARD + max(2 * embed, working_bytes(checkpoint))


def working_bytes(checkpoint: Checkpoint) -> int:
    """One layer and its largest stage at work: weights, stacked copies, two square matrices, one
    chunk.
    """
    prefix = f"{checkpoint.architecture.layers}.0."
    layer = {k[len(prefix) :]: e for k, e in checkpoint.entries.items() if k.startswith(prefix)}
    worst = 0
    for stage in checkpoint.architecture.stages:
        shapes = [layer[f"{name}.weight"].shape for name in stage.names]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        worst = max(worst, 8 * columns * columns + 8 * rows * columns)
    return 2 * sum(entry.nbytes for entry in layer.values()) + worst + chunk_bytes(checkpoint)


def outputs_per_token(checkpoint: Checkpoint) -> int:
    """Numbers per token that wait between the passes over a layer: its input and all Linear
    outputs.
    """
    prefix = f"{checkpoint.architecture.layers}.0."
    names = checkpoint.architecture.linears()
    rows = sum(checkpoint.entries[f"{prefix}{name}.weight"].shape[0] for name in names)
    return rows + checkpoint.config.hidden_size


def chunk_bytes(checkpoint: Checkpoint) -> int:
    """One chunk inside a layer's forward, with room for fp32 copies."""
    return 4 * CHUNK_TOKENS * outputs_per_token(checkpoint)


def activation_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """All calibration tokens waiting between two passes, in the run's dtype."""
    return tokens * outputs_per_token(checkpoint) * checkpoint.dtype.itemsize
