"""Which training a work folder holds: what must be equal for a run to go on from its checkpoint."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .loop import Loop

# Of a spec: what the result does not depend on, or (the last two) only in its last bits, which is
# told when a run goes on.
_NOT_DECIDING = ("path", "save_every", "shard", "parts")


def identity(loop: Loop) -> dict[str, Any]:
    """Everything that decides the result, as plain JSON."""
    spec = loop.spec.model_dump(mode="json")
    held = None if loop.held_out is None else loop.held_out.digest()
    return {
        "spec": {name: value for name, value in spec.items() if name not in _NOT_DECIDING},
        "precision": loop.precision,
        "objective": str(getattr(loop.objective, "identity", type(loop.objective).__name__)),
        "learning": {name: list(p.shape) for name, p in loop.parameters.items()},
        "texts": {"training": loop.training.digest(), "held_out": held},
        "weights": _sample(loop),
    }


def _sample(loop: Loop) -> str:
    """SHA-256 of 64 numbers of every weight that does not learn: enough to tell models apart."""
    found = hashlib.sha256()
    fixed = dict(loop.whole.model.named_parameters())
    fixed |= {n: b for n, b in loop.whole.model.named_buffers() if not b.is_floating_point()}
    for name, tensor in fixed.items():
        if not tensor.requires_grad and tensor.numel():
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 64)].contiguous().cpu()
            found.update(f"{name}{list(tensor.shape)}".encode())
            found.update(some.view(torch.uint8).numpy())
    return found.hexdigest()
