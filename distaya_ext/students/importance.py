"""How much a teacher's channels, MLP neurons and groups of heads count, and what its norms become.

Importance by activation is Minitron's (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2):
mean |act(gate) * up| of a neuron, mean |norm output| of a channel over all norms of that width,
mean length of a head's output, summed over the heads that share a key and a value. One layer is in
memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..compress.calibrate import Calibration
from ..compress.capture import Calls, Ends, load_layer
from ..compress.store import Store
from ..models.skeleton import build_skeleton
from .shape import Shape, own_shape

OnLayer = Callable[[int, int], None]  # layers done, layers in all
O_PROJ, DOWN = "self_attn.o_proj", "mlp.down_proj"


@dataclass
class Importance:
    """Float64 scores, larger counts more: channels [hidden], and of each layer neurons
    [intermediate] and groups [kv_heads].
    """

    channels: torch.Tensor
    neurons: list[torch.Tensor]
    groups: list[torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """Of a norm cut to the channels that stay: the factor on its weight, and the relative squared
    error that is left of its output on those channels.
    """

    factor: float
    error: float


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores, ascending; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def by_activation(
    checkpoint: Checkpoint,
    calibration: Calibration,
    device: torch.device,
    on_layer: OnLayer | None = None,
) -> Importance:
    """Importance over the tokens of the windows."""
    own = own_shape(checkpoint)
    sums = _empty(own)
    norms = 0

    def channels(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        sums.channels += _rows(out).abs().sum(dim=0).cpu()

    def attach(layer: int, module: nn.Module) -> None:
        nonlocal norms
        found = wide_norms(module, own.hidden)
        norms += len(found)
        for norm in found.values():
            norm.register_forward_hook(channels)
        if layer < len(own.layers):
            _watch(module, own, sums.neurons[layer], sums.groups[layer])

    walk(checkpoint, calibration, device, attach, on_layer)
    sums.channels /= max(1, norms) * calibration.tokens
    for part in (*sums.neurons, *sums.groups):
        part /= calibration.tokens
    return sums


def _watch(layer: nn.Module, own: Shape, neurons: torch.Tensor, groups: torch.Tensor) -> None:
    """Sums into neurons and groups what o_proj and down_proj of a living layer read."""

    def heads(module: nn.Module, args: tuple) -> None:
        z = _rows(args[0]).reshape(-1, own.kv_heads, own.heads // own.kv_heads, own.head_dim)
        groups.add_(z.norm(dim=-1).sum(dim=(0, 2)).cpu())

    def glu(module: nn.Module, args: tuple) -> None:
        neurons.add_(_rows(args[0]).abs().sum(dim=0).cpu())

    layer.get_submodule(O_PROJ).register_forward_pre_hook(heads)
    layer.get_submodule(DOWN).register_forward_pre_hook(glu)


def by_magnitude(checkpoint: Checkpoint) -> Importance:
    """Importance without any text: norms of the weights that make and read a neuron, read a group
    of heads, write a channel (embedding, o_proj, down_proj).
    """
    own = own_shape(checkpoint)
    found = _empty(own)
    (embed,) = checkpoint.read([f"{checkpoint.architecture.embed}.weight"]).values()
    squares = torch.zeros_like(found.channels)
    for part in embed.split(1 << 14):
        squares += part.double().square().sum(dim=0)
    for layer in range(len(own.layers)):
        prefix = f"{checkpoint.architecture.layers}.{layer}."
        names = (O_PROJ, DOWN, "mlp.gate_proj", "mlp.up_proj")
        read = checkpoint.read(f"{prefix}{name}.weight" for name in names)
        o, down, gate, up = (W.double().square() for W in read.values())
        squares += o.sum(dim=1) + down.sum(dim=1)
        found.neurons[layer] = (gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0)).sqrt()
        found.groups[layer] = o.sum(dim=0).reshape(own.kv_heads, -1).sum(dim=1).sqrt()
    found.channels = squares.sqrt()
    return found


def by_chance(checkpoint: Checkpoint, seed: int) -> Importance:
    """Random scores: what the others are to be compared with."""
    generator = torch.Generator().manual_seed(seed)

    def draw(part: torch.Tensor) -> torch.Tensor:
        return torch.rand(part.shape, generator=generator, dtype=torch.float64)

    empty = _empty(own_shape(checkpoint))
    return Importance(
        draw(empty.channels), [draw(p) for p in empty.neurons], [draw(p) for p in empty.groups]
    )


def fit_norms(
    checkpoint: Checkpoint,
    calibration: Calibration,
    kept: torch.Tensor,
    device: torch.device,
    narrow: Callable[[torch.Tensor], torch.Tensor],
    on_layer: OnLayer | None = None,
) -> dict[str, Fit]:
    """How each norm as wide as the model is rescaled for the channels `kept`, by module name.

    A norm over fewer channels divides by another root mean square, and a LayerNorm takes off
    another mean. With y the teacher's output on the kept channels and z that of the cut norm,
    the factor g = sum yz / sum zz over all tokens is least squares; it cannot mend what differs
    from token to token, which error = sum (y - gz)^2 / sum yy measures. narrow makes the cut
    norm's weight.
    """
    own = own_shape(checkpoint)
    sums: dict[str, torch.Tensor] = {}
    there = kept.to(device)

    def attach(layer: int, module: nn.Module) -> None:
        inside = layer < len(own.layers)
        prefix = f"{checkpoint.architecture.layers}.{layer}." if inside else ""
        for name, norm in wide_norms(module, own.hidden).items():
            full = f"{prefix}{name}" if inside else checkpoint.architecture.norm
            cut = copy.deepcopy(norm)
            cut.weight = nn.Parameter(narrow(norm.weight.data), requires_grad=False)
            sums[full] = torch.zeros(3, dtype=torch.float64)
            norm.register_forward_hook(_compare(cut, there, sums[full]))

    walk(checkpoint, calibration, device, attach, on_layer)
    fits = {}
    for name, (yz, zz, yy) in ((name, part.tolist()) for name, part in sums.items()):
        factor = yz / zz if zz else 1.0
        fits[name] = Fit(factor, max(0.0, 1.0 - yz * yz / (zz * yy)) if zz and yy else 0.0)
    return fits


def _compare(cut: nn.Module, kept: torch.Tensor, into: torch.Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        y = _rows(out)[:, kept]
        z = _rows(cut(args[0][..., kept]))
        into.add_(torch.stack([(y * z).sum(), (z * z).sum(), (y * y).sum()]).cpu())

    return hook


def wide_norms(module: nn.Module, hidden: int) -> dict[str, nn.Module]:
    """Norms over all channels inside a layer (or the final norm itself, named ""); not those of
    queries and keys.
    """
    return {
        name: part
        for name, part in module.named_modules()
        if "norm" in type(part).__name__.lower()
        and name.rpartition(".")[2] not in ("q_norm", "k_norm")
        and tuple(part.weight.shape) == (hidden,)
    }


@torch.no_grad()
def walk(
    checkpoint: Checkpoint,
    calibration: Calibration,
    device: torch.device,
    attach: Callable[[int, nn.Module], None],
    on_layer: OnLayer | None = None,
) -> None:
    """Run all windows through the model, one living layer after the other, then the final norm.

    attach(index, layer) may put hooks on the layer before it runs; the final norm comes last,
    numbered as one layer more.
    """
    ends = Ends(build_skeleton(checkpoint.config, checkpoint.dtype), checkpoint, device)
    calls, hidden = Calls(), Store()
    for chunk, ids in enumerate(calibration.chunks()):
        first, each = ends.inputs(ids.to(device))
        hidden.put(chunk, first)
        calls.add(each)
    for index, weightless in enumerate(ends.layers):
        layer = load_layer(
            weightless, f"{checkpoint.architecture.layers}.{index}", checkpoint, device
        )
        attach(index, layer)
        for chunk in range(len(calls)):
            hidden.put(chunk, calls.of(index, chunk).run(layer, hidden.get(chunk)))
        if on_layer is not None:
            on_layer(index + 1, len(ends.layers))
    norm = ends.model.get_submodule(checkpoint.architecture.norm)
    attach(len(ends.layers), norm)
    for chunk in range(len(calls)):
        norm(hidden.get(chunk))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1, x.shape[-1]).double()


def _empty(own: Shape) -> Importance:
    def zeros(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)

    return Importance(
        zeros(own.hidden),
        [zeros(own.intermediate) for _ in own.layers],
        [zeros(own.kv_heads) for _ in own.layers],
    )
