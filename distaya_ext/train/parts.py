"""What of a model learns: LoRA, whole weights under their mask, scales, norms, embeddings.

    model = distaya_ext.load("small")
    parts = prepare(model, TrainSpec(train="lora", rank=16))
    ...                                   # fit(model, ...): trains parts.trainable()
    parts.write(open_checkpoint("small", packed=True), Path("healed"))

Everything that learns is float32 and is rounded to the dtype of the model where it is used, so that
what is measured in training is what the written folder holds. Codes of quantised weights and zeros
of pruned ones never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UsageError
from ..ranks import by_first, team
from ..runtime.modules import Packed, PackedHead, PackedLinear
from ..runtime.swap import trainable
from . import masters, scales
from .choose import (
    embedding,
    inside,
    is_lora,
    learn,
    low_rank_of,
    norms,
    plain_modules,
    targeted,
    weights,
)
from .learned import Learned
from .sharding import gathered
from .spec import TrainSpec

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from .merge import Merged


@dataclass
class Parts:
    """What learns in a model, by the names of its parameters.

    counts    parameters that learn, and their share of the model's weights
    notices   what the user should know, a sentence each
    """

    model: Any
    spec: TrainSpec
    notices: list[str] = field(default_factory=list)

    def trainable(self) -> dict[str, nn.Parameter]:
        """float32 parameters that learn, by name, in the order of the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def count(self) -> int:
        """How many numbers learn."""
        return sum(p.numel() for p in self.trainable().values())

    @property
    def share(self) -> float:
        """count over the weights of the model, what was added not counted."""
        return self.count / weights(self.model)

    def state(self) -> dict[str, Tensor]:
        """Copies of what learns, on the CPU, by name."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.trainable().items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Give what learns the values of state(). InputError unless names and shapes agree."""
        mine = self.trainable()
        if odd := sorted(set(mine) ^ set(tensors)):
            raise InputError(
                f"{len(tensors)} tensors are given for {len(mine)} that learn; {odd[0]} is in only "
                "one of the two"
            )
        for name, parameter in mine.items():
            if parameter.shape != tensors[name].shape:
                raise InputError(
                    f"{name} is {list(tensors[name].shape)} and the model has "
                    f"{list(parameter.shape)}"
                )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(tensors[name])

    def learned(self) -> Learned:
        """What was found, by the names of the model's folder, on the CPU; to be called by all ranks
        where parameters are sharded.
        """
        found = Learned(masked=True)
        for name, module in plain_modules(self.model):
            if is_lora(module):
                found.low_rank[name] = low_rank_of(module)
            base = getattr(module, "base_layer", module)
            if isinstance(base, scales.ScaledLinear):
                found.scales[name] = base.scales().detach().cpu()
        for name, parameter in self.trainable().items():
            plain = masters.plain_name(name)
            if ".lora_" not in plain and not plain.endswith(scales.PARAMETER):
                found.tensors[plain] = gathered(parameter.detach()).cpu()
        return found

    def write(
        self,
        source: Checkpoint,
        out: str | Path,
        *,
        overwrite: bool = False,
        extra: Callable[[Path, Merged], None] | None = None,
    ) -> Merged:
        """Write the folder of `source` with what was learnt in it; see merge.write_trained. All
        ranks call it, and the first one writes.
        """
        from .merge import Merged, write_trained

        learned = self.learned()
        if team().alone:
            return write_trained(
                source, learned, out, overwrite=overwrite, notices=self.notices, extra=extra
            )

        def written() -> dict[str, Any]:
            return write_trained(
                source, learned, out, overwrite=overwrite, notices=self.notices, extra=extra
            ).summary()

        return Merged(Path(out), **by_first(written))

    def write_adapter(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write LoRA, norms and embeddings that learnt as a PEFT adapter folder alone."""
        from .adapter_write import write_adapter

        return write_adapter(self.learned(), out, overwrite=overwrite)


def prepare(model: Any, spec: TrainSpec) -> Parts:
    """Attach to a causal language model what `spec` says learns, in place.

    model  what distaya_ext.load or transformers loaded, of any family and format

    lora    dense Linears get PEFT's LoRA; pruned ones (more than 5 % zeros) an update that is
            masked as they are, W + mask * (alpha / rank) B A, so that merging keeps the pattern;
            packed ones LoRA beside their kernel. B starts at 0, A is drawn with spec.seed. LoRA
            that is there already goes on where it has the same rank and alpha
    full    all dense weights, norms and biases; pruned weights stay 0, packed ones do not learn
    scales  scales of packed Linears, codes fixed

    Whatever else there is gets requires_grad False. UsageError in one sentence when nothing would
    learn or spec asks for what this model cannot do.
    """
    parts = Parts(model, spec)
    trainable(model)
    model.requires_grad_(False)
    if spec.train == "full":
        _full(parts)
    if spec.train == "scales" or "scales" in spec.also:
        _scales(parts)
    if spec.train == "lora":
        _lora(parts)
    if "norms" in spec.also:
        learn(model, norms(model))
    if "embeddings" in spec.also:
        learn(model, embedding(model))
    if not parts.count:
        raise UsageError(_nothing(spec))
    return parts


def _lora(parts: Parts) -> None:
    from .adapter import need_peft

    need_peft("LoRA")
    from . import lora

    model, spec = parts.model, parts.spec
    alpha = float(spec.rank if spec.alpha is None else spec.alpha)
    names, there = [], []
    for name, module in plain_modules(model):
        base = getattr(module, "base_layer", module)
        if not isinstance(base, nn.Linear | PackedLinear | PackedHead | scales.ScaledLinear):
            continue
        if targeted(model, spec, name, module):
            (there if is_lora(module) else names).append(name)
    for name in there:
        held = low_rank_of(model.get_submodule(name))
        if (held.rank, held.alpha) != (spec.rank, alpha):
            raise UsageError(
                f"{name} has LoRA of rank {held.rank} and alpha {held.alpha:g} already, and rank "
                f"{spec.rank} and alpha {alpha:g} are asked for; train with the same, or start "
                "from the folder without its adapter"
            )
    lora.inject(model, names, spec.rank, alpha, spec.seed)
    for name in [*names, *there]:
        for parameter in lora.parameters(model.get_submodule(name)):
            parameter.requires_grad_(True)


def _full(parts: Parts) -> None:
    model, chosen, packed = parts.model, [], 0
    for name, module in plain_modules(model):
        if isinstance(module, Packed):
            packed += 1
        inner = getattr(module, "base_layer", module)
        chosen += [
            (inside(name, module), inner, which)
            for which, parameter in inner.named_parameters(recurse=False)
            if parameter.is_floating_point()
        ]
    if packed:
        parts.notices.append(f"{packed} quantised matrices keep their weights and do not learn")
    learn(model, chosen)


def _scales(parts: Parts) -> None:
    found = {
        inside(name, module): getattr(module, "base_layer", module)
        for name, module in plain_modules(parts.model)
    }
    packed = {name: module for name, module in found.items() if isinstance(module, PackedLinear)}
    for name, module in packed.items():
        scales.attach(parts.model, name, module)
    if packed:
        parts.notices.append(
            f"the scales of {len(packed)} matrices learn; each of them is made dense in float32 "
            "while it is multiplied"
        )
    elif "scales" in parts.spec.also:
        raise UsageError("the model has no quantised Linears, so no scales can learn")


def _nothing(spec: TrainSpec) -> str:
    if spec.train == "lora" and spec.targets:
        return f"nothing would learn: no Linear of the model is found by {', '.join(spec.targets)}"
    why = {
        "lora": "the model has no Linear",
        "full": "all weights of the model are quantised; train LoRA or scales",
        "scales": "the model has no quantised Linears, so no scales can learn; train LoRA or full",
    }
    return f"nothing would learn: {why[spec.train]}"
