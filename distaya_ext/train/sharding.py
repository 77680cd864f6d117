"""Students too large for one device: PyTorch's FSDP2, so that every rank holds a share.

Each decoder layer is a group of parameters, and what stands around the layers (embedding, last
norm, head, what the loss trains beside) is another. A rank has 1 / N of the rows of every parameter
that learns, in float32, of its gradient and of its two moments. A group's parameters are gathered
before it runs and again before its backward pass, and its gradients are summed and dealt out behind
it. What does not learn stays whole on every rank.

Gathering takes all ranks, so each of them has to run the model equally often, and backwards through
the same parameters: one that has nothing left to learn from runs on a row whose loss counts 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..models import describe
from ..ranks import team
from .spec import TrainSpec

T = TypeVar("T")
_WHOLE = "_distaya_whole"


@dataclass(frozen=True)
class Shards:
    """pruned: names (of optimiser.learning) of parameters whose zeros get no gradient."""

    pruned: frozenset[str]


class Both(nn.Module):
    """The model and the modules of its loss, which learn together and stay where they are.

    shards: how they are sharded, None where every rank has all of them. What uses the parameters
    of a sharded model goes through run().
    """

    shards: Shards | None = None

    def __init__(self, model: nn.Module, modules: nn.Module | None):
        super().__init__()
        self.model = model
        self.modules_of_loss = modules

    def to(self, *_: Any, **__: Any) -> Both:
        return self

    def forward(self, fn: Callable[[], T]) -> T:
        return fn()

    def run(self, fn: Callable[[], T]) -> T:
        """fn() while the parameters outside the decoder layers are there."""
        if self.shards is None:
            return fn()
        found = self(lambda: _owned(fn()))
        if not torch.is_grad_enabled():
            self.reshard()  # type: ignore[operator]  # or the next step would find them as they are
        return found


def _owned(found: Any) -> Any:
    """Terms of a loss as tensors of their own: FSDP warns of views that go out."""
    return {n: t.clone() for n, t in found.items()} if isinstance(found, dict) else found


def whole_of(model: Any, modules: nn.Module | None = None) -> Both:
    """The model with the modules of its loss; of a sharded one those it was sharded with."""
    found = model.__dict__.get(_WHOLE)
    return Both(model, modules) if found is None else found


def wanted(spec: TrainSpec) -> bool:
    """Whether a run's parameters are sharded. UsageError where what learns cannot be."""
    if spec.shard == "none":
        return False
    if spec.train != "full":
        raise UsageError(
            f"shard {spec.shard} is for train full, where every dense weight learns; {spec.train} "
            "learns little, which every rank has whole, so leave it out"
        )
    return not team().alone


def shard(model: Any, modules: nn.Module | None, spec: TrainSpec, device: torch.device) -> None:
    """Shard in place what learns of the model and of the loss's modules, over all ranks, where the
    spec asks for it; all of the model is then on `device`.
    """
    if not wanted(spec) or _WHOLE in model.__dict__:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from .optimiser import learning

    whole = Both(model, modules)
    named = learning(whole)
    whole.shards = Shards(frozenset(n for n, p in named.items() if getattr(p, "pruned", False)))
    fixed = {p for p in whole.parameters() if not p.requires_grad}
    for parameter in fixed:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (team().world,))
    layers = model.get_submodule(describe(model.config).layers)
    for layer in layers:
        if any(p.requires_grad for p in layer.parameters()):
            fully_shard(layer, mesh=mesh, ignored_params=fixed)
    fully_shard(whole, mesh=mesh, ignored_params=fixed)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            # Sums: the loop divides by the labels of all ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    object.__setattr__(model, _WHOLE, whole)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor; to be called by every rank, in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, where `like` is and sharded as it is."""
    if not is_sharded(like):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, places = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(like.device), mesh, places, src_data_rank=None)
