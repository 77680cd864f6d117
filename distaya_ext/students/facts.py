"""What a candidate is: sizes from its own classes, costs that follow from them, its licence."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import Checkpoint
from ..errors import UsageError
from ..models import Architecture
from ..models.skeleton import build_skeleton, is_tied

_BUDGET = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([KMBT]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LICENCE_BYTES = 4096  # of a file are looked at
_LICENCE_LENGTH = 100  # characters shown


def parse_budget(text: str | int | float) -> int:
    """Parameters of 1.5B, 500M, 8e8 or 1500000. UsageError for anything else."""
    found = _BUDGET.fullmatch(str(text).strip())
    count = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not 1 <= count < 1e15:
        raise UsageError(
            f"a budget is a number of parameters such as 1.5B, 500M or 8e8, not {text!r}"
        )
    return round(count)


def count_text(count: float) -> str:
    """Parameters in the unit that fits: 1.54B, 12.3M, 800."""
    for unit in ("T", "B", "M", "K"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.3g}{unit}"
    return f"{count:.0f}"


@dataclass(frozen=True)
class Facts:
    """Sizes of a model. parameters counts tied ones once; embedding and head are what those two
    hold of it (head 0 where it is the embedding); kv_bytes: keys and values of one token in all
    layers, in the model's own dtype (layers with a sliding window keep them for its length only).
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    parameters: int
    embedding: int
    head: int
    dtype: str
    weight_bytes: int
    kv_bytes: int
    licence: str | None

    @property
    def inside(self) -> int:
        """Parameters between embedding and head."""
        return self.parameters - self.embedding - self.head

    @property
    def flop_per_token(self) -> int:
        """About: a multiplication and an addition per weight, those of the head too."""
        return 2 * (self.inside + self.vocabulary * self.hidden)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self) | {"inside": self.inside}


def facts(checkpoint: Checkpoint) -> Facts:
    """Of a model that is there."""
    model = build_skeleton(checkpoint.config, checkpoint.dtype)
    return count(
        model, checkpoint.architecture, weight_bytes=checkpoint.nbytes, folder=checkpoint.folder
    )


def count(
    model: nn.Module,
    architecture: Architecture,
    *,
    weight_bytes: int | None = None,
    folder: Path | None = None,
) -> Facts:
    """Of a model without weights; weight_bytes None: those of its parameters in its dtype."""
    config = model.config
    embed, head = (model.get_submodule(p).weight for p in (architecture.embed, architecture.head))
    tied = is_tied(model, architecture)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kv = 0
    for layer in model.get_submodule(architecture.layers):
        attention = layer.get_submodule("self_attn")
        kv += attention.k_proj.out_features + attention.v_proj.out_features
    itemsize = embed.dtype.itemsize
    return Facts(
        model_type=architecture.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        vocabulary=config.vocab_size,
        tied=tied,
        parameters=parameters,
        embedding=embed.numel(),
        head=0 if tied else head.numel(),
        dtype=str(embed.dtype).removeprefix("torch."),
        weight_bytes=parameters * itemsize if weight_bytes is None else weight_bytes,
        kv_bytes=kv * itemsize,
        licence=None if folder is None else licence(folder),
    )


def licence(folder: Path) -> str | None:
    """The licence that the folder's model card names, else the first line of its licence file."""
    card = _start(folder / "README.md")
    if card.startswith("---"):
        for line in card.split("\n---", 1)[0].splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("license", "licence") and value.strip():
                return value.strip().strip("'\"")[:_LICENCE_LENGTH]
    for path in sorted(folder.glob("LICEN[CS]E*")):
        lines = [line.strip() for line in _start(path).splitlines() if line.strip()]
        if lines:
            return lines[0][:_LICENCE_LENGTH]
    return None


def _start(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(_LICENCE_BYTES).decode("utf-8", errors="replace")
