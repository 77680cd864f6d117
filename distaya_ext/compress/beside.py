"""What the output holds besides layers: embedding, head and norms, as they were or rounded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..checkpoint import Checkpoint, ShardWriter
from .packing import Packing
from .report import Report


class Beside:
    """Writes it, and accounts for it in the report."""

    def __init__(
        self, checkpoint: Checkpoint, packing: Packing, report: Report, device: torch.device
    ):
        self.checkpoint, self.packing, self.report = checkpoint, packing, report
        self.device = device

    def rest(self, writer: ShardWriter) -> None:
        """All that is neither in a layer nor in embedding or head."""
        parts = self.checkpoint.architecture
        others = (f"{parts.embed}.", f"{parts.head}.", f"{parts.layers}.")
        self._copy(writer, lambda name: not name.startswith(others))

    def end(self, writer: ShardWriter, name: str) -> None:
        """Write embedding or head, rounded to 8 bits where the recipe says so."""
        if name not in self.packing.ends:
            self._copy(writer, lambda tensor: tensor.startswith(name + "."))
            entry = self.checkpoint.entries.get(f"{name}.weight")
            if entry is not None:
                bits = 8 * entry.dtype.itemsize
                self.report.account_end(name, *entry.shape, bits, entry.nbytes)
            return
        grid = self.packing.embedding(name, self.device)
        size = writer.add_all(name, self.packing.encode(name, grid))
        self.report.account_end(name, grid.rows, grid.cols, grid.bits, size)
        self._copy(writer, lambda tensor: tensor == f"{name}.bias")

    def _copy(self, writer: ShardWriter, wanted: Callable[[str], bool]) -> None:
        """Copy tensors unchanged, in the dtype they were stored in."""
        for name in filter(wanted, self.checkpoint.entries):
            writer.add(name, self.checkpoint.read([name])[name])
