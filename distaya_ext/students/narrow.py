"""Cutting one stored tensor of a teacher to what its student keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint
from ..models import Architecture
from .importance import Fit
from .shape import Shape, own_shape

# What rows and columns of the Linears of a layer are, in every family of the architecture table.
_ROWS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "key",
    "o_proj": "hidden",
    "gate_proj": "neurons",
    "up_proj": "neurons",
    "down_proj": "hidden",
}
_COLUMNS = {"o_proj": "query", "down_proj": "neurons"}  # all others read the hidden state
_PER_HEAD = {"q_norm": "query heads", "k_norm": "key heads"}
# Families whose norms multiply by 1 + weight.
_ONE_MORE = ("gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Kept:
    """Indices int64 that stay, ascending: channels, and of each layer neurons and groups of heads
    (None: all).
    """

    channels: torch.Tensor | None
    neurons: list[torch.Tensor | None]
    groups: list[torch.Tensor | None]


class Knife:
    """Cuts tensors by their names.

    embed_factor: what the student's embedding is multiplied by where the model itself multiplies
    it by a function of its width (Gemma); a head tied to it is set right in the final norm.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        kept: Kept,
        fits: dict[str, Fit],
        embed_factor: float = 1.0,
    ):
        self.architecture, self.own, self.shape = (
            checkpoint.architecture,
            own_shape(checkpoint),
            shape,
        )
        self.kept, self.fits, self.embed_factor = kept, fits, embed_factor
        self.one_more = float(checkpoint.architecture.model_type in _ONE_MORE)
        self.tied = checkpoint.tied

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The student's tensor of this name [rows, columns] or [channels], in the same dtype."""
        module, _, suffix = name.rpartition(".")
        start = f"{self.architecture.layers}."
        if module in (self.architecture.embed, self.architecture.head):
            wide = suffix == "weight"
            cut = self._take(tensor, 1, self.kept.channels) if wide else tensor
            return self._scaled(cut) if module == self.architecture.embed else cut
        if not name.startswith(start):  # the final norm
            return self._norm(module, self._take(tensor, 0, self.kept.channels))
        index, _, inside = module.removeprefix(start).partition(".")
        indices = self._indices(int(index))
        part = inside.rpartition(".")[2]
        if part in _ROWS:
            cut = self._take(tensor, 0, indices[_ROWS[part]])
            return cut if suffix == "bias" else self._take(cut, 1, indices[_columns(part)])
        if part in _PER_HEAD:  # [head_dim] for all heads, or [heads, head_dim]
            return self._take(tensor, 0, indices[_PER_HEAD[part]]) if tensor.dim() == 2 else tensor
        return self._norm(module, self._take(tensor, 0, self.kept.channels))

    def _indices(self, layer: int) -> dict[str, torch.Tensor | None]:
        groups, width = self.kept.groups[layer], self.own.head_dim
        each = self.own.heads // self.own.kv_heads
        queries = None if groups is None else _spread(groups, each)
        return {
            "hidden": self.kept.channels,
            "neurons": self.kept.neurons[layer],
            "key heads": groups,
            "query heads": queries,
            "key": None if groups is None else _spread(groups, width),
            "query": None if queries is None else _spread(queries, width),
        }

    @staticmethod
    def _take(tensor: torch.Tensor, dim: int, indices: torch.Tensor | None) -> torch.Tensor:
        return tensor if indices is None else tensor.index_select(dim, indices)

    def _scaled(self, embedding: torch.Tensor) -> torch.Tensor:
        if self.embed_factor == 1.0:
            return embedding
        return (embedding.float() * self.embed_factor).to(embedding.dtype)

    def _norm(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        fit = self.fits.get(module)
        factor = 1.0 if fit is None else fit.factor
        if self.tied and module == self.architecture.norm:
            factor /= self.embed_factor
        if factor == 1.0:
            return weight
        scaled = (weight.double() + self.one_more) * factor - self.one_more
        return scaled.to(weight.dtype)


def cut_size(
    name: str, size: tuple[int, ...], shape: Shape, architecture: Architecture
) -> tuple[int, ...]:
    """Size of a stored tensor in a student of this shape, given its size in the teacher."""
    module, _, suffix = name.rpartition(".")
    part = module.rpartition(".")[2]
    lengths = {
        "hidden": shape.hidden,
        "neurons": shape.intermediate,
        "query heads": shape.heads,
        "key heads": shape.kv_heads,
        "query": shape.heads * shape.head_dim,
        "key": shape.kv_heads * shape.head_dim,
    }
    if module in (architecture.embed, architecture.head):
        return (size[0], shape.hidden) if suffix == "weight" else size
    if part in _PER_HEAD:
        return (lengths[_PER_HEAD[part]], *size[1:]) if len(size) == 2 else size
    if part in _ROWS:
        rows = lengths[_ROWS[part]]
        return (rows,) if suffix == "bias" else (rows, lengths[_columns(part)])
    return (shape.hidden,)


def narrowed(channels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What cuts a norm's weight to these channels, wherever it lies."""
    return lambda weight: weight.index_select(0, channels.to(weight.device))


def _columns(part: str) -> str:
    return _COLUMNS.get(part, "hidden")


def _spread(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of all members of blocks of `width` consecutive ones."""
    return (blocks[:, None] * width + torch.arange(width)).reshape(-1)
