"""What a compression with a dense twin should see, by two whole models in memory.

One model stays dense, the other gets the weights of the layer at work as they stand at each stage.
Both run over every chunk in full, with hooks; no output is kept from one stage to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distaya_ext.compress import Calibration
from distaya_ext.compress.twin import Twin
from distaya_ext.models import Architecture, Stage, describe

Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> its input and its output


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def observe(model: nn.Module, architecture: Architecture, index: int, ids: torch.Tensor) -> Seen:
    """Input and output of a layer (under ""), of its blocks and of its Linears."""
    layer, seen, handles = model.get_submodule(f"{architecture.layers}.{index}"), {}, []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[name] = (x.clone(), first(out).clone())

        return hook

    for name in ("", *architecture.blocks, *architecture.linears()):
        module = layer.get_submodule(name)
        handles.append(module.register_forward_hook(note(name), with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@dataclass
class Pair:
    """What pairs() gave of a stage and a chunk, and what the two whole models saw then."""

    layer: int
    stage: Stage
    chunk: int
    x: torch.Tensor
    y: torch.Tensor
    dense: Seen
    now: Seen


@dataclass
class Watch:
    """Notes every pair of a run and the dense stream after every layer."""

    folder: Path
    calibration: Calibration
    pairs: list[Pair] = field(default_factory=list)
    hidden: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)  # layer, chunk, h
    runs: list[dict[str, int]] = field(default_factory=list)  # per layer: dense Linear -> tokens

    def on(self, monkeypatch: Any) -> "Watch":
        """Compressions of the test are noted from now on."""
        self.dense, self.now = (
            AutoModelForCausalLM.from_pretrained(self.folder).eval() for _ in range(2)
        )
        self.architecture = describe(self.dense.config)
        watch, pairs, finish, start = self, Twin.pairs, Twin.finish, Twin.__init__
        linear, names = nn.functional.linear, {}

        def noted_start(twin: Twin, layer: nn.Module, *rest: Any) -> None:
            start(twin, layer, *rest)
            names.clear()
            for name in watch.architecture.linears():
                names[id(layer.get_submodule(name).weight)] = name
            watch.runs.append(dict.fromkeys(names.values(), 0))

        def noted_linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
            if id(weight) in names:
                watch.runs[-1][names[id(weight)]] += x[..., 0].numel()
            return linear(x, weight, *rest)

        def noted_pairs(twin: Twin, stage: Stage) -> Any:
            watch.copy(twin)
            for chunk, x, y in pairs(twin, stage):
                watch.note(stage, chunk, x, y)
                yield chunk, x, y

        def noted_finish(twin: Twin) -> None:
            finish(twin)
            watch.copy(twin)
            for chunk in range(len(list(watch.calibration.chunks()))):
                watch.hidden.append(
                    (watch.layer, chunk, twin.hidden.get(("hidden", chunk)).clone())
                )

        monkeypatch.setattr(Twin, "__init__", noted_start)
        monkeypatch.setattr(Twin, "pairs", noted_pairs)
        monkeypatch.setattr(Twin, "finish", noted_finish)
        monkeypatch.setattr(nn.functional, "linear", noted_linear)
        return self

    @property
    def layer(self) -> int:
        return len(self.runs) - 1

    def copy(self, twin: Twin) -> None:
        """The whole model gets the weights that the layer at work has now."""
        layer = self.now.get_submodule(f"{self.architecture.layers}.{self.layer}")
        with torch.no_grad():
            for name, p in layer.named_parameters():
                p.copy_(twin.walk.layer.get_parameter(name))

    def note(self, stage: Stage, chunk: int, x: torch.Tensor, y: torch.Tensor) -> None:
        ids = list(self.calibration.chunks())[chunk]
        seen = (observe(m, self.architecture, self.layer, ids) for m in (self.dense, self.now))
        self.pairs.append(Pair(self.layer, stage, chunk, x.clone(), y.clone(), *seen))
