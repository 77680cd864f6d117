"""The shape of a student cut out of its teacher: what may be asked for, what config.json says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..checkpoint import Checkpoint
from ..checkpoint.folder import read_json
from ..errors import InputError, UsageError, one_line
from ..models.depth import cut_json, layers_left
from ..models.skeleton import build_skeleton


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; layers are the teacher's that stay, by their numbers there."""

    layers: tuple[int, ...]
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**asdict(self), "layers": list(self.layers)}


def own_shape(checkpoint: Checkpoint) -> Shape:
    """The teacher's own."""
    config, prefix = checkpoint.config, f"{checkpoint.architecture.layers}.0.self_attn"
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Shape(
        layers=tuple(range(config.num_hidden_layers)),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=checkpoint.entries[f"{prefix}.k_proj.weight"].shape[0] // kv_heads,
    )


def plan(
    checkpoint: Checkpoint,
    *,
    layers: Sequence[int] | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
) -> Shape:
    """The shape asked for, None being the teacher's. UsageError for one that the teacher's weights
    cannot fill or that transformers does not build.
    """
    own = own_shape(checkpoint)
    for name, size, most in (
        ("hidden", hidden, own.hidden),
        ("intermediate", intermediate, own.intermediate),
        ("heads", heads, own.heads),
    ):
        if size is not None and not 1 <= size <= most:
            raise UsageError(f"{name} of {size} cannot be cut out of the teacher's {most}")
    group = own.heads // own.kv_heads
    if heads is not None and heads % group:
        raise UsageError(
            f"heads of {heads} are no whole groups: {group} query heads share a key and a value"
        )
    left = own.layers
    if layers is not None:
        absent = [i for i in own.layers if i not in layers]
        left = layers_left(len(own.layers), absent)
        if sorted(layers) != list(left):
            raise UsageError(
                f"layers {', '.join(map(str, layers))} are not different layers of the teacher's "
                f"{len(own.layers)}, from 0 to {len(own.layers) - 1}"
            )
    shape = Shape(
        layers=left,
        hidden=hidden or own.hidden,
        intermediate=intermediate or own.intermediate,
        heads=heads or own.heads,
        kv_heads=(heads or own.heads) // group,
        head_dim=own.head_dim,
    )
    skeleton(checkpoint, shape)
    return shape


def config_json(checkpoint: Checkpoint, shape: Shape, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of the student; raw is the teacher's, checkpoint the teacher with all layers."""
    own = own_shape(checkpoint)
    if shape.layers != own.layers:
        raw = cut_json(raw, checkpoint.config, shape.layers)
    raw = {**raw, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate}
    if (shape.hidden, shape.heads) != (own.hidden, own.heads):
        # Heads keep their width, which most families would otherwise take to be hidden / heads.
        raw |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
        raw["head_dim"] = shape.head_dim
    return raw


def skeleton(checkpoint: Checkpoint, shape: Shape) -> nn.Module:
    """The student without weights. UsageError where transformers does not build it as asked."""
    raw = config_json(checkpoint, shape, read_json(checkpoint.folder, "config.json"))
    raw.pop("quantization_config", None)
    kind, asked = checkpoint.architecture.model_type, f"{shape.hidden} and {shape.heads} heads"
    try:
        config = type(checkpoint.config).from_dict(raw)
    except Exception as error:  # transformers and its validators raise many kinds here
        raise UsageError(
            f"transformers builds no {kind} of hidden size {asked}: {one_line(error, 200)}"
        ) from error
    try:
        return build_skeleton(config, checkpoint.dtype)
    except InputError as error:
        raise UsageError(
            f"transformers builds no {kind} of hidden size {asked}: {error}"
        ) from error
