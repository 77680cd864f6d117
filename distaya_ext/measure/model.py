"""`distaya bench model`: prefill and decode of a whole model beside its dense twin, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import find_device
from ..errors import InputError, UsageError
from . import clock, limits
from .clock import Contender
from .decode import StaticDecode, fits


@dataclass(frozen=True)
class Setting:
    """How long the prompt is, how many tokens are decoded after it, and on what."""

    prompt: int = 128
    new: int = 32
    runs: int = 3
    threads: int | None = None  # torch's own
    device: str = "cpu"
    dtype: str = "auto"
    exact: bool = False
    offline: bool = False


@dataclass(frozen=True)
class ModelRow:
    """One model. Rates in tokens per second, medians; nbytes: parameters and buffers in memory."""

    name: str
    weights: str  # how they are kept, e.g. "int4-2:4, int8" or "bfloat16"
    threads: int
    nbytes: int
    prompt: int
    prefill_seconds: float
    prefill_rate: float
    new: int
    decode_seconds: float  # of one token
    decode_rate: float
    contended: bool
    graph_rate: float | None = None  # decoding as one CUDA graph with a cache of fixed size


@dataclass
class ModelResult:
    """read: GB/s that the same threads read from memory in the same run, the ceiling of decoding;
    None where it was not measured. in_cache: the first model fits into the last cache, which lifts
    that ceiling.
    """

    rows: list[ModelRow] = field(default_factory=list)
    read: float | None = None
    in_cache: bool = False

    @property
    def ratios(self) -> dict[str, float] | None:
        """First row over second: tokens per second, and the share of its bytes."""
        if len(self.rows) < 2:
            return None
        ours, dense = self.rows
        found = {
            "prefill": ours.prefill_rate / dense.prefill_rate,
            "decode": ours.decode_rate / dense.decode_rate,
            "bytes": ours.nbytes / dense.nbytes,
        }
        if ours.graph_rate and dense.graph_rate:
            found["graph"] = ours.graph_rate / dense.graph_rate
        return found


def measure(
    path: str | Path,
    against: str | Path | None = None,
    setting: Setting | None = None,
    *,
    note: Callable[[str], Any] = lambda text: None,
) -> ModelResult:
    """Load both, let them work in turn, keep medians.

    A packed model without `against` runs beside its own weights made dense. InputError for a folder
    that cannot be loaded, UsageError for a prompt that does not fit the model.
    """
    from ..runtime import load

    s = setting or Setting()
    options = {"device": s.device, "dtype": s.dtype, "offline": s.offline}
    models = {str(path): load(path, exact=s.exact, **options)}
    if against is not None:
        name = str(against) if str(against) != str(path) else f"{against} again"
        models[name] = load(against, exact=s.exact, **options)
    elif kinds(next(iter(models.values()))):
        from ..runtime.dense import to_dense

        note("no --against: the dense model beside it is the same one, its weights made dense")
        models["the same, dense"] = to_dense(load(path, **options))
    return with_ceiling(compare(models, s), find_device(s.device))


def compare(models: dict[str, Any], s: Setting) -> ModelResult:
    """Rows of loaded models. InputError when one gives no finite logits."""
    from ..runtime import resident_bytes

    ids = _prompt(models, s)
    runs = {name: _Runner(model, ids, s.new) for name, model in models.items()}
    with clock.threads_kept(), torch.inference_mode():
        threads = s.threads or torch.get_num_threads()
        prefill = [Contender(name, run.prefill, runs=s.runs) for name, run in runs.items()]
        first = clock.compare(prefill, threads)
        for name, run in runs.items():
            run.check(name)
        decode = [
            Contender(name, run.decode, run.prefill, runs=s.runs) for name, run in runs.items()
        ]
        then = clock.compare(decode, threads)
        graphs = {name: graph_rate(model, ids, s) for name, model in models.items()}
    rows = []
    for name, model in models.items():
        each = then[name].wall / s.new
        rows.append(
            ModelRow(
                name=name,
                weights=", ".join(kinds(model)) or str(model.dtype).removeprefix("torch."),
                threads=threads,
                nbytes=resident_bytes(model),
                prompt=s.prompt,
                prefill_seconds=first[name].wall,
                prefill_rate=s.prompt / first[name].wall,
                new=s.new,
                decode_seconds=each,
                decode_rate=1 / each,
                contended=not (first[name].trusted and then[name].trusted),
                graph_rate=graphs[name],
            )
        )
    return ModelResult(rows)


def with_ceiling(result: ModelResult, device: torch.device) -> ModelResult:
    """The result with the rate of reading memory, where the first model does not fit into the cache
    and there is room for what is read.
    """
    cache, row = limits.cache_bytes(device), result.rows[0]
    result.in_cache = row.nbytes <= cache
    wanted = max(256 << 20, 5 * cache)  # what Machine reads
    if not result.in_cache and 2 * wanted < limits.free_bytes(device):
        with clock.threads_kept():
            result.read = limits.Machine(device, wanted).at(row.threads).read
    return result


def graph_rate(model: Any, ids: Tensor, s: Setting) -> float | None:
    """Tokens per second of decoding as one CUDA graph. None on the CPU, and where a sliding window
    fills up on the way.
    """
    if model.device.type != "cuda" or not fits(model, s.prompt + s.new):
        return None
    decode = StaticDecode(model, ids.to(model.device), s.new)
    decode.capture()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(s.runs + 1):
        begin.record()
        decode.run(s.new)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return s.new / statistics.median(times[1:])  # the first one warms


class _Runner:
    """A model with its prompt; greedy, one sequence."""

    def __init__(self, model: Any, ids: Tensor, new: int) -> None:
        self.model, self.new = model, new
        self.ids = ids.to(model.device)

    def prefill(self) -> tuple[Any, Tensor]:
        """The cache and the first token."""
        return self._step(self.ids, None)

    def decode(self, cache: Any, token: Tensor) -> Tensor:
        for _ in range(self.new):
            cache, token = self._step(token, cache)
        return token

    def check(self, name: str) -> None:
        if not bool(self.model(input_ids=self.ids).logits.isfinite().all()):
            raise InputError(f"{name} gives logits that are not finite; its speed means nothing")

    def _step(self, ids: Tensor, cache: Any) -> tuple[Any, Tensor]:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        if token.is_cuda:
            torch.cuda.synchronize(token.device)
        return out.past_key_values, token


def kinds(model: Any) -> list[str]:
    """Kinds of the packed modules of a model, each once; [] of a dense one."""
    from ..runtime.modules import Packed

    found = {m.format.kind for m in model.modules() if isinstance(m, Packed) and m.format}
    return sorted(found)


def _prompt(models: dict[str, Any], s: Setting) -> Tensor:
    """Random tokens [1, prompt] that all models know."""
    for name, model in models.items():
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and s.prompt + s.new > room:
            raise UsageError(
                f"{s.prompt} prompt tokens and {s.new} new ones exceed the {room} positions of "
                f"{name}"
            )
    vocabulary = min(model.config.vocab_size for model in models.values())
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, s.prompt), generator=random)
