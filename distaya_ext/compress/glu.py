"""Method dass: what the neurons of a gated MLP do before any is pruned, their order, the masks.

The probe is dense and on the stream of the compressed layers: gate and up of this layer run once
more on the inputs that their statistic is gathered from, and the moments of act(g) * u are summed
without forming it. Then the neurons may change places, which changes no output: rows of gate and up
(and their biases) go with columns of down.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from ..checkpoint import Checkpoint
from ..errors import InputError, UsageError
from ..models import Architecture, Stage
from ..ops import dass
from ..ops import mask as mask_op
from ..ops import obs as obs_op
from ..ops.hessian import column_sq_
from ..ranks import Sum
from ..recipe import DassSpec, Recipe
from ..runtime.glu import activation
from .ferry import Checks
from .rows import Rows
from .settings import Settings
from .statistic import Statistic

_BALANCED = DassSpec(direction="inputs", update=True, permute=True)  # and nothing of DaSS

GATE, UP, DOWN = PARTS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def linears(architecture: Architecture) -> tuple[str, ...]:
    """Linears of a layer that method dass prunes. UsageError where no MLP is gated."""
    names = architecture.linears()
    if missing := [name for name in PARTS if name not in names]:
        raise UsageError(
            f"method dass prunes gated MLPs; layers of {architecture.model_type} have no "
            f"{', '.join(missing)}"
        )
    return tuple(name for name in names if name in PARTS)


def check(plan: Mapping[str, Settings], recipe: Recipe, checkpoint: Checkpoint) -> None:
    """UsageError where a pattern does not fit or half an MLP would change places."""
    for index in range(checkpoint.config.num_hidden_layers):
        names = [f"{checkpoint.architecture.layers}.{index}.{name}" for name in PARTS]
        skipped = [name for name in names if name not in plan]
        if recipe.dass.permute and 0 < len(skipped) < len(names):
            raise UsageError(
                f"permute moves rows of gate and up with columns of down, so skip must take all "
                f"three of a layer or none, but it takes {', '.join(skipped)} alone"
            )
        if recipe.nm_pair is not None and len(skipped) < len(names):
            _whole_groups(recipe, names[0], *checkpoint.entries[f"{names[0]}.weight"].shape)


def _whole_groups(recipe: Recipe, name: str, neurons: int, columns: int) -> None:
    unit = recipe.nm_pair[1]
    if neurons % unit:
        raise UsageError(
            f"pattern {recipe.nm} along neurons needs a multiple of {unit}; {name} has {neurons}"
        )
    if recipe.dass.direction == "inputs" and columns % unit:
        raise UsageError(
            f"pattern {recipe.nm} along inputs needs a multiple of {unit}; {name} has {columns}"
        )


def notices(recipe: Recipe, plan: Mapping[str, Settings], checkpoint: Checkpoint) -> list[str]:
    """What the user should know of method dass, and of MLPs whose neurons stay where they are
    although the recipe lets them change places.
    """
    if recipe.permute:
        return _stay(plan, checkpoint)
    if recipe.method != "dass":
        return []
    text = "method dass prunes gate_proj, up_proj and down_proj; all other Linears stay dense"
    if recipe.nm is not None and recipe.dass.direction == "outputs":
        text += (
            f"; {recipe.nm} of gate_proj and up_proj runs along their outputs, which sparse tensor "
            "cores do not read (direction: inputs does)"
        )
    return [text]


def _stay(plan: Mapping[str, Settings], checkpoint: Checkpoint) -> list[str]:
    """Layers whose MLP is compressed in part, or with a down_proj of no N:M pattern."""
    why = []
    for index in range(checkpoint.config.num_hidden_layers):
        found = {n: plan.get(f"{checkpoint.architecture.layers}.{index}.{n}") for n in PARTS}
        absent = [name for name in PARTS if found[name] is None]
        if 0 < len(absent) < len(PARTS):
            why.append(f"layer {index} ({' and '.join(absent)} not compressed)")
        elif not absent and found[DOWN].nm is None:
            why.append(f"layer {index} ({DOWN} without an N:M pattern)")
    if not why:
        return []
    return [
        "permute moves neurons only where all three matrices of an MLP are compressed and "
        f"{DOWN} is pruned to N:M, so they stay where they are in {', '.join(why)}"
    ]


def of(
    prefix: str, layer: nn.Module, plan: Mapping[str, Settings], checks: Checks
) -> GatedMLP | None:
    """The gated MLP of a living layer where method dass prunes some of it, or where its neurons may
    change places, for which all three matrices must be written anew; else None.
    """
    found = [plan.get(f"{prefix}.{name}") for name in PARTS]
    for settings in found:
        if settings is not None and settings.method == "dass":
            return GatedMLP(layer, settings, settings.dass, checks)
    down = found[-1]
    if None not in found and down.permute and down.nm is not None:
        return GatedMLP(layer, down, _BALANCED, checks)
    return None


class GatedMLP:
    """The MLP of one living decoder layer. order: where its neurons came from, None: they stay."""

    def __init__(self, layer: nn.Module, settings: Settings, options: DassSpec, checks: Checks):
        self.settings, self.options, self.checks = settings, options, checks
        self.modules = {name: layer.get_submodule(name) for name in PARTS}
        weight = self.modules[GATE].weight
        self.neurons, columns = weight.shape
        self.act = activation(layer.get_submodule("mlp.act_fn"))
        if self.act is None:
            kind = type(layer.get_submodule("mlp.act_fn")).__name__
            raise InputError(
                f"the neurons of an MLP gated by {', '.join(dass.ACTIVATIONS)} can be judged, not "
                f"of one gated by {kind}"
            )
        self.tokens = 0
        self.order: torch.Tensor | None = None
        self._moments = torch.zeros(3, self.neurons, dtype=torch.float64, device=weight.device)
        self._squares = torch.zeros(columns, dtype=torch.float32, device=weight.device)
        unit = settings.nm[1] if settings.nm is not None else 1
        self.dense = int(self.neurons * self.options.dense_neurons) // unit * unit
        swept = self.options.update and self.options.direction == "inputs"
        self._chosen_by_sweep = swept
        self.sweeps_twice = swept and self.dense > 0  # first for what is kept

    def sums(self, stage: Stage) -> list[Sum]:
        """What see() adds to."""
        return [Sum(self._moments), Sum(self._squares)] if GATE in stage.names else []

    def count(self, stage: Stage, tokens: int) -> None:
        """So many tokens were seen, by all processes together."""
        if GATE in stage.names:
            self.tokens = tokens

    def see(self, stage: Stage, x: torch.Tensor) -> None:
        """Tokens x [..., columns] on their way into gate and up (of other stages: nothing)."""
        if GATE not in stage.names:
            return
        flat = x.reshape(-1, x.shape[-1])
        gate, up = self.modules[GATE], self.modules[UP]
        with torch.no_grad():  # not the modules: the walk counts and orders their calls
            g = functional.linear(flat, gate.weight, gate.bias)
            u = functional.linear(flat, up.weight, up.bias)
        dass.moments_(self._moments, g, u, self.act)
        column_sq_(self._squares, flat)
        self.tokens += flat.shape[0]

    def masks(self, names: list[str], statistic: Statistic) -> list[torch.Tensor] | None:
        """What is kept of the Linears, None where the sweep chooses. The first call gives the
        neurons their order.
        """
        if self.options.permute and self.order is None and GATE in names:
            self._permute()
        if self._chosen_by_sweep and not self.sweeps_twice:
            return None
        weights = [self.modules[name].weight.data for name in names]
        if self.sweeps_twice:
            return self._swept(names, weights, statistic)
        return [self._mask(name, W, statistic) for name, W in zip(names, weights, strict=True)]

    def moved(self, name: str) -> dict[str, torch.Tensor]:
        """What else of a Linear changed with the order of the neurons, by suffix: its bias."""
        if self.order is None or name not in (GATE, UP) or self.modules[name].bias is None:
            return {}
        return {"bias": self.modules[name].bias.data}

    def _a_norm(self) -> torch.Tensor:
        """Root mean square of each input of down, before this MLP was pruned; fp32 [neurons]."""
        return (self._moments[0] / max(1, self.tokens)).sqrt().float()

    def _permute(self) -> None:
        gate, up, down = (self.modules[name].weight.data for name in PARTS)
        x_norm = (self._squares / max(1, self.tokens)).sqrt()
        worth = dass.neuron_scores(gate, up, down, self._moments, x_norm)
        scores = self._features(gate, up, down) if self.settings.nm is not None else None
        self.order = dass.arrange(worth, self.dense, scores, self.settings.nm)
        self._moments = self._moments[:, self.order].contiguous()
        for name in (GATE, UP):
            module = self.modules[name]
            module.weight.data = module.weight.data[self.order]
            if module.bias is not None:
                module.bias.data = module.bias.data[self.order]
        self.modules[DOWN].weight.data = down[:, self.order].contiguous()

    def _features(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Scores of whatever is pruned in groups of neurons, fp32 [neurons, features]."""
        norm, widths = self._a_norm(), [down.shape[0]]
        if self.options.direction == "outputs":
            widths += [gate.shape[1], up.shape[1]]
        scores = torch.empty(self.neurons, sum(widths), dtype=torch.float32, device=down.device)
        for k, part in enumerate(scores.split(widths, dim=1)):
            if k == 0:
                part.copy_(mask_op.wanda(down, norm).t())
            else:
                part.copy_(dass.gate_up((gate, up)[k - 1], norm, self.options.alpha))
            mean = dass.total_of(part) / part.numel()
            part.div_(mean.clamp(min=1e-30))  # each matrix counts the same
        return scores

    def _swept(
        self, names: list[str], weights: list[torch.Tensor], statistic: Statistic
    ) -> list[torch.Tensor]:
        """What a sweep along the inputs chooses, and all of the dense neurons.

        Along inputs a neuron's norm is a factor of the whole row of gate or up, which changes
        neither an N:M choice nor an update, so the sweep's own choice is the better one.
        """
        live = self.neurons - self.dense
        parts = [W if name == DOWN else W[:live] for name, W in zip(names, weights, strict=True)]
        rows = Rows(sum(map(len, parts)))
        found = obs_op.obs(
            rows.part(torch.cat(parts)),
            statistic.matrix(),
            sparsity=self.settings.sparsity,
            nm=self.settings.nm,
            damp=self.settings.damp,
            later=lambda factor: None,  # the sweep that follows has the same one judged
            among=rows.among,
        )
        chosen = rows.whole(found.mask).split([len(part) for part in parts])
        masks = [torch.ones_like(W, dtype=torch.bool) for W in weights]
        for name, mask, choice in zip(names, masks, chosen, strict=True):
            if name == DOWN:
                mask[:, :live] = choice[:, :live]
            else:
                mask[:live] = choice
        return masks

    def _mask(self, name: str, W: torch.Tensor, statistic: Statistic) -> torch.Tensor:
        """Kept weights of one matrix [rows, cols]; the dense neurons at its end are kept whole."""
        live = self.neurons - self.dense
        keep = torch.ones_like(W, dtype=torch.bool)
        part = (slice(live), slice(None)) if name != DOWN else (slice(None), slice(live))
        scores = self._scores(name, W[part].contiguous(), statistic, live)
        direction = "inputs" if name == DOWN else self.options.direction
        settings, shape = self.settings, scores.shape
        keep[part], bad = dass.choose(scores, settings.sparsity, settings.nm, direction)
        self.checks.expect(lambda bad: mask_op.need_ranked(bad, shape), bad)
        return keep

    def _scores(self, name: str, W: torch.Tensor, statistic: Statistic, live: int) -> torch.Tensor:
        """As published: all norms are those before this MLP was pruned. Before an update those of
        down are what it will see.
        """
        if name != DOWN:
            return dass.gate_up(W, self._a_norm()[:live], self.options.alpha)
        later = self.options.update or not self.tokens
        return mask_op.wanda(
            W, (statistic.norms() if later else self._a_norm())[:live].contiguous()
        )
