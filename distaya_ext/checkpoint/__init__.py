"""Checkpoints: a strict reader and a writer that never leaves half a model behind."""

from .folder import locate
from .reader import Checkpoint, Entry, aligned, check_finite, open_checkpoint
from .writer import (
    MARKER,
    ShardWriter,
    Staging,
    check_companions,
    check_output,
    copy_companions,
    header_bytes,
    part_name,
    put_in_place,
    write_config,
    write_tensors,
)

__all__ = [
    "MARKER",
    "Checkpoint",
    "Entry",
    "ShardWriter",
    "Staging",
    "check_companions",
    "aligned",
    "check_finite",
    "check_output",
    "copy_companions",
    "header_bytes",
    "locate",
    "open_checkpoint",
    "part_name",
    "put_in_place",
    "write_config",
    "write_tensors",
]
