"""What each decoder layer is called with, recorded from the model's own forward.

The decoder layers of a weightless model are replaced by stand-ins that note their arguments and
hand the hidden states on. Masks, rotary tables and whatever else a family passes are thus taken
verbatim, layer by layer, and no model code is written twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..models.skeleton import is_tied
from ..ranks import read_shared


@dataclass
class Call:
    """Arguments of one decoder layer besides the hidden states [windows, length, hidden]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # the hidden states were passed as hidden_states=...

    def run(self, layer: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """Output hidden states of the layer, whether it returns a tensor or a tuple."""
        if self.by_name:
            out = layer(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            out = layer(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def in_float(self) -> Call:
        """The same with masks and tables in float32."""
        return Call(_float(self.args), _float(self.kwargs), self.by_name)


def _float(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.float() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _float(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_float(value) for value in tree)
    return tree


class _StandIn(nn.Module):
    """Takes a decoder layer's place; attributes the model asks for are those of the layer."""

    def __init__(self, layer: nn.Module, replacement: torch.Tensor | None = None):
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule
        self.call: Call | None = None
        self.hidden: torch.Tensor | None = None
        self._replacement = replacement

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        by_name = "hidden_states" in kwargs
        hidden = kwargs.pop("hidden_states") if by_name else args[0]
        self.call = Call(args if by_name else args[1:], kwargs, by_name)
        self.hidden = hidden
        return hidden if self._replacement is None else self._replacement


class Ends:
    """A weightless model plus its ends (embedding, final norm, head) from the checkpoint. shared:
    all processes of the run make one now, and read it together.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        shared: bool = False,
    ):
        self.model, self._shared = model, shared
        self.architecture = checkpoint.architecture
        self.layers = list(model.get_submodule(self.architecture.layers))
        self._load(checkpoint, device)

    def _load(self, checkpoint: Checkpoint, device: torch.device) -> None:
        tied = is_tied(self.model, self.architecture)
        for path in (self.architecture.embed, self.architecture.norm, self.architecture.head):
            module = self.model.get_submodule(path)
            if tied and path == self.architecture.head:
                module.weight = self.model.get_submodule(self.architecture.embed).weight
                continue
            names = [f"{path}.{name}" for name in module.state_dict()]
            tensors = (read_shared if self._shared else Checkpoint.read)(checkpoint, names)
            state = {
                name[len(path) + 1 :]: t.to(device, checkpoint.dtype) for name, t in tensors.items()
            }
            module.load_state_dict(state, assign=True)
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))

    def inputs(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """First hidden states [B, L, hidden] of windows ids [B, L]; the call of every layer."""
        with self._stand_ins() as stand_ins:
            base = self.model.get_submodule(self.architecture.layers.rpartition(".")[0])
            base(input_ids=ids, use_cache=False)
        if any(stand_in.call is None for stand_in in stand_ins):
            raise InputError(
                "the model's forward does not call all of its decoder layers; it cannot be walked"
            )
        return stand_ins[0].hidden, [stand_in.call for stand_in in stand_ins]

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions, given the output of the last decoder layer."""
        with self._stand_ins(hidden):
            return self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits

    @contextmanager
    def _stand_ins(self, last: torch.Tensor | None = None) -> Iterator[list[_StandIn]]:
        parent_path, _, name = self.architecture.layers.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        original = getattr(parent, name)
        count = len(self.layers)
        stand_ins = [
            _StandIn(layer, last if i == count - 1 else None) for i, layer in enumerate(self.layers)
        ]
        setattr(parent, name, nn.ModuleList(stand_ins))
        try:
            with torch.no_grad():
                yield stand_ins
        finally:
            setattr(parent, name, original)


class Calls:
    """The calls of every layer for every chunk, stored once per distinct set of arguments."""

    def __init__(self) -> None:
        self._sets: list[list[Call]] = []
        self._of_chunk: list[int] = []

    def add(self, calls: list[Call]) -> None:
        """Note the calls of the next chunk; equal ones (same masks, tables, flags) are shared."""
        for index, known in enumerate(self._sets):
            seen: dict[tuple[int, int], bool] = {}  # layers share masks and tables
            if all(
                _same((a.args, a.kwargs), (b.args, b.kwargs), seen)
                for a, b in zip(known, calls, strict=True)
            ):
                self._of_chunk.append(index)
                return
        self._sets.append(calls)
        self._of_chunk.append(len(self._sets) - 1)

    def __len__(self) -> int:
        return len(self._of_chunk)

    def of(self, layer: int, chunk: int) -> Call:
        return self._sets[self._of_chunk[chunk]][layer]


def _same(a: Any, b: Any, seen: dict[tuple[int, int], bool]) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        pair = (id(a), id(b))
        if pair not in seen:
            seen[pair] = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return seen[pair]
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key], seen) for key in a)
    return bool(a == b)


def load_layer(
    model_layer: nn.Module,
    prefix: str,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    shared: bool = False,
) -> nn.Module:
    """A living copy of one weightless decoder layer, its weights read from the shards in the run's
    dtype. shared: by all processes of the run together.
    """
    weights = read_layer(model_layer, prefix, checkpoint, device, shared=shared)
    return fill_layer(model_layer, weights, device)


def read_layer(
    model_layer: nn.Module,
    prefix: str,
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    *,
    shared: bool = False,
) -> dict[str, torch.Tensor]:
    """Weights of a decoder layer by their names in it, read from the shards in the run's dtype.
    shared: by all processes of the run together, to the host.
    """
    names = [f"{prefix}.{name}" for name in model_layer.state_dict()]
    tensors = read_shared(checkpoint, names) if shared else checkpoint.read(names, device)
    return {name[len(prefix) + 1 :]: t.to(checkpoint.dtype) for name, t in tensors.items()}


def fill_layer(
    model_layer: nn.Module, weights: dict[str, torch.Tensor], device: torch.device
) -> nn.Module:
    """A living copy of one weightless decoder layer that holds these weights."""
    layer = copy.deepcopy(model_layer)
    layer.load_state_dict(weights, assign=True)
    return layer.to(device).requires_grad_(False).eval()


def check_tied(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    """InputError for a head that config.json ties to the embedding and that is another matrix."""
    architecture = checkpoint.architecture
    embed, head = (f"{path}.weight" for path in (architecture.embed, architecture.head))
    if head not in checkpoint.entries or not is_tied(skeleton, architecture):
        return
    pair = checkpoint.read([embed, head])
    if not torch.equal(pair[embed], pair[head]):
        raise InputError(
            f"config.json ties {head} to {embed}, but the checkpoint holds two different ones"
        )
