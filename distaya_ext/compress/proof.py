"""The proof that comes before any weight is touched: layer by layer equals the model as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.whole import load_whole
from ..errors import InputError
from ..finite import all_finite
from ..models.depth import remove_layers
from ..models.skeleton import build_skeleton, feed_whole
from .capture import Ends, load_layer

PROOF_WINDOWS = 2
LOGIT_ELEMENTS = 1 << 24  # logits compared at most (the last positions of each window)
_ULPS = 1  # rounding steps of the run's dtype allowed at the largest logit (on the CPU it is 0)


@dataclass(frozen=True)
class Proof:
    """kind 'whole': against the model loaded by transformers itself. kind 'truncated': against the
    first `layers` layers (every kind of layer at least once) and the head, run as one model."""

    kind: str
    layers: int
    windows: int
    positions: int
    max_abs_diff: float
    tolerance: float

    @property
    def exact(self) -> bool:
        return self.max_abs_diff == 0.0


def prove(checkpoint: Checkpoint, ids: torch.Tensor, device: torch.device, *, whole: bool) -> Proof:
    """Replay windows ids [B, L] one layer at a time and compare logits with the model's own
    forward.

    Raises InputError when they differ by more than one rounding of the largest logit, or are not
    finite.
    """
    layers = checkpoint.config.num_hidden_layers if whole else truncated_depth(checkpoint.config)
    ids = ids.to(device)
    keep = max(
        1, min(ids.shape[1], LOGIT_ELEMENTS // (ids.shape[0] * checkpoint.config.vocab_size))
    )
    replayed = _replay(checkpoint, ids, device, layers, keep)
    own = _own(checkpoint, ids, device, None if whole else layers, keep)
    if not all_finite(own):
        raise InputError(
            f"the model's own logits are not finite over its first {layers} layers; "
            f"its weights overflow in {str(checkpoint.dtype).removeprefix('torch.')}"
        )
    largest = float(torch.stack(own.aminmax()).abs().max())
    diff = float(replayed.sub_(own).abs_().max())  # in place: logits are large
    tolerance = _ULPS * torch.finfo(checkpoint.dtype).eps * largest
    proof = Proof("whole" if whole else "truncated", layers, ids.shape[0], keep, diff, tolerance)
    if not diff <= tolerance:  # also when NaN
        raise InputError(
            f"the layer-by-layer replay does not reproduce the model's own logits over {layers} "
            f"layers: "
            f"they differ by {diff:.3g} where {tolerance:.3g} is allowed; nothing was compressed"
        )
    return proof


def truncated_depth(config: object) -> int:
    """Layers needed to see every kind of layer once, at least two."""
    kinds = list(getattr(config, "layer_types", None) or [])
    first = [kinds.index(kind) + 1 for kind in set(kinds)]
    return min(config.num_hidden_layers, max([2, *first]))


def _replay(
    checkpoint: Checkpoint, ids: torch.Tensor, device: torch.device, layers: int, keep: int
) -> torch.Tensor:
    skeleton = build_skeleton(checkpoint.config, checkpoint.dtype, layers)
    ends = Ends(skeleton, checkpoint, device)
    feed_whole(skeleton.get_output_embeddings())
    hidden, calls = ends.inputs(ids)
    with torch.no_grad():
        for index, (layer, call) in enumerate(zip(ends.layers, calls, strict=True)):
            prefix = f"{checkpoint.architecture.layers}.{index}"
            hidden = call.run(load_layer(layer, prefix, checkpoint, device), hidden)
        return ends.logits(ids, hidden, keep).float()


def _own(
    checkpoint: Checkpoint, ids: torch.Tensor, device: torch.device, layers: int | None, keep: int
) -> torch.Tensor:
    if layers is None:
        model = load_whole(checkpoint.folder, checkpoint.dtype)
        if checkpoint.left_out:
            remove_layers(model, checkpoint.architecture, checkpoint.source_layers)
        model = model.to(device)
    else:
        model = build_skeleton(checkpoint.config, checkpoint.dtype, layers)
        ends = Ends(model, checkpoint, device)
        for index, layer in enumerate(ends.layers):
            prefix = f"{checkpoint.architecture.layers}.{index}"
            parent = model.get_submodule(checkpoint.architecture.layers)
            parent[index] = load_layer(layer, prefix, checkpoint, device)
    feed_whole(model.get_output_embeddings())
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float()
