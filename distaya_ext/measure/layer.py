"""One decoder layer of an Aya shape, decoding a token at a time: packed beside dense bf16.

The layer is transformers' own Cohere layer with random weights, and what is packed runs through the
modules that distaya_ext.load puts there. Weights are rotated past the caches, as in rulers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResourceError
from ..ops import pack
from . import clock, limits, rulers
from .clock import Contender
from .shapes import MODELS, Model, Shape

CONTEXT = 128  # tokens in the cache before the first step
_STEPS = 8  # tokens of one sample; more where the copies are more
_RUNS = 5
_AGAIN = 1  # times a comparison is repeated when a contender had no quiet run


@dataclass(frozen=True)
class LayerRow:
    """seconds: of one token through the layer, median. times_dense: how many times faster."""

    model: str
    name: str
    threads: int
    nbytes: int  # of weights
    seconds: float
    tokens_per_second: float
    gbs: float
    times_dense: float
    contended: bool


def measure(
    model: str,
    kinds: Sequence[str],
    threads: Sequence[int],
    streamed: int | None = None,
    *,
    modes: Sequence[str] = rulers.MODES[:1],
    sizes: Model | None = None,
    steps: int = _STEPS,
) -> list[LayerRow]:
    """Rows of "dense bf16" and of every kind x mode, for each number of threads; CPU only.

    model names the sizes (shapes.MODELS) unless they are given. streamed: bytes of copies, four
    times the last cache without it. ResourceError when the dense layer does not fit into memory.
    """
    sizes = sizes or MODELS[model]
    cpu = torch.device("cpu")
    streamed = streamed or 4 * limits.cache_bytes(cpu)
    weights = sizes.hidden * (2 * sizes.hidden + 2 * sizes.kv + 3 * sizes.ff)
    need = 3 * weights + (len(kinds) + 1) * (weights + streamed)
    if need > limits.free_bytes(cpu):
        raise ResourceError(
            f"a {model} layer needs {need / 2**30:.1f} GiB of memory and "
            f"{limits.free_bytes(cpu) / 2**30:.1f} GiB are free"
        )
    found: list[LayerRow] = []
    with clock.threads_kept(), torch.inference_mode():
        torch.set_num_threads(max(threads))
        config = _config(sizes)
        layers = {"dense bf16": _dense(config)}
        layers |= {kind: _packed(config, kind) for kind in kinds}
        names = ["dense bf16"]
        runs = {"dense bf16": _Decoder(config, layers["dense bf16"], streamed, steps)}
        for kind in kinds:
            for mode in modes:
                names.append(kind if mode == "a8" else f"{kind} exact")
                runs[names[-1]] = _Decoder(config, layers[kind], streamed, steps, mode == "exact")
        for count in threads:
            found += _compare(model, runs, count)
    return found


def _compare(model: str, runs: dict[str, _Decoder], threads: int) -> list[LayerRow]:
    contenders = [Contender(name, run, run.prepare, _RUNS) for name, run in runs.items()]
    timings = clock.compare(contenders, threads)
    for _ in range(_AGAIN):
        if all(timing.trusted for timing in timings.values()):
            break
        timings = clock.compare(contenders, threads)
    each = {name: timings[name].wall / run.steps for name, run in runs.items()}
    dense = each["dense bf16"]
    return [
        LayerRow(
            model=model,
            name=name,
            threads=threads,
            nbytes=run.nbytes,
            seconds=each[name],
            tokens_per_second=1 / each[name],
            gbs=run.nbytes / each[name] / 1e9,
            times_dense=dense / each[name],
            contended=not timings[name].trusted,
        )
        for name, run in runs.items()
    ]


class _Decoder:
    """`steps` tokens, each through the next copy of the layer."""

    def __init__(
        self, config: Any, layer: nn.Module, streamed: int, steps: int, exact: bool = False
    ) -> None:
        from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding

        from ..runtime import resident_bytes, set_exact

        self.nbytes = resident_bytes(layer)
        self.exact, self._set_exact = exact, set_exact
        self.copies = rulers.copies_of(layer, self.nbytes, streamed, copy.deepcopy)
        self.steps = max(steps, len(self.copies))
        self.config = config
        random = torch.Generator().manual_seed(5)
        size = (1, self.steps, config.hidden_size)
        self.x = torch.randn(size, generator=random).to(torch.bfloat16)
        positions = torch.arange(CONTEXT, CONTEXT + self.steps)[None]
        self.angles = CohereRotaryEmbedding(config)(self.x, positions)
        self._next = 0

    def prepare(self) -> tuple[Any]:
        """Outside the clock: a cache of CONTEXT tokens, and the activations of this mode."""
        from transformers import DynamicCache

        for layer in self.copies:
            self._set_exact(layer, self.exact)
        heads, head = self.config.num_key_value_heads, self.config.head_dim
        cache = DynamicCache()
        keys = torch.full((1, heads, CONTEXT, head), 0.1, dtype=torch.bfloat16)
        cache.update(keys, keys.clone(), 0)
        return (cache,)

    def __call__(self, cache: Any) -> Tensor:
        cos, sin = self.angles
        for i in range(self.steps):
            layer = self.copies[self._next]
            self._next = (self._next + 1) % len(self.copies)
            y = layer(
                self.x[:, i : i + 1],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=(cos[:, i : i + 1], sin[:, i : i + 1]),
            )
        return y


def _config(sizes: Model) -> Any:
    from transformers import CohereConfig

    return CohereConfig(
        vocab_size=8,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ff,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        attn_implementation="sdpa",
    )


def _dense(config: Any) -> nn.Module:
    """The layer with random bf16 weights."""
    layer = _empty(config)
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            shape = Shape(name, module.out_features, module.in_features)
            weight = rulers.random_dense(shape, torch.device("cpu"))
            module.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _packed(config: Any, kind: str) -> nn.Module:
    """The layer with random packed weights; gate and up run as one kernel."""
    from ..formats import ModuleScheme
    from ..runtime import PackedLinear, fuse

    layer = _empty(config)
    bits = pack.Format(kind, 64, 128, nm=rulers.nm_of(kind)).bits
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            shape = Shape(name, module.out_features, module.in_features)
            scheme = ModuleScheme(bits=bits, kind=kind, nm=rulers.nm_of(kind))
            packed = PackedLinear(scheme, shape.rows, shape.cols)
            packed.hold(rulers.random_packed(shape, kind, torch.device("cpu")))
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, packed)
    fuse(layer)
    return layer


def _empty(config: Any) -> nn.Module:
    """The layer without memory for its Linears; the norm in bf16."""
    from transformers.models.cohere.modeling_cohere import CohereDecoderLayer

    with torch.device("meta"):
        layer = CohereDecoderLayer(config, 0)
    norm = layer.input_layernorm
    norm.weight = nn.Parameter(
        torch.ones(config.hidden_size, dtype=torch.bfloat16), requires_grad=False
    )
    return layer.eval()
