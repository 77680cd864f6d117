"""What a run holds in memory, phase by phase: the numbers that `distaya plan` shows and judges by.

peak = the process as it is when the model is open + the largest phase. The layers are counted by
running them without data (dry.py); proof, recording, the ends and the shards here, from shapes.
Every factor below counts tensors that are alive in the code it names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint import Checkpoint
from . import dry
from .budget import Budget, Needs, activation_bytes, chunk_bytes
from .calibrate import Calibration
from .packing import EMBED_BLOCK, Packing
from .plan import Plan
from .proof import LOGIT_ELEMENTS, PROOF_WINDOWS, truncated_depth

_CHUNKS = 3  # run without data at most; all further ones add what the third added
_DENSE_BLOCK = 4 * 8 << 20  # Grid.dense: 4 Mi weights at once, in fp32 and as int16 twice


@dataclass(frozen=True)
class Memory:
    """Bytes. process: before the run's own; phases: what each adds to it at most, in order."""

    process: int
    phases: dict[str, int]
    spilled: bool
    whole_proof: bool
    shard_bytes: int

    @property
    def peak(self) -> int:
        return self.process + max(self.phases.values(), default=0)

    @property
    def worst(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=self.phases.__getitem__)


@dataclass(frozen=True)
class Job:
    """What is to be run: the checkpoint without the layers that go, and how its Linears are solved.
    calibration None: the methods look at no tokens. weights: of languages, as recipes say it.
    limited: the recipe has a max_ram.
    """

    checkpoint: Checkpoint
    plan: Plan
    packing: Packing
    needs: Needs
    calibration: Calibration | None
    weights: Any = "equal"
    limited: bool = False

    @property
    def tokens(self) -> int:
        return 0 if self.calibration is None else self.calibration.tokens

    @property
    def waiting(self) -> int:
        """Bytes of the activations that wait between passes."""
        return activation_bytes(self.checkpoint, self.tokens, self.needs)

    def with_chunks(self, chunks: int) -> Job:
        """The same with the first chunks of the tokens."""
        if self.calibration is None:
            return self
        count = chunks * self.calibration.windows_per_chunk
        few = replace(
            self.calibration,
            ids=self.calibration.ids[:count],
            languages=self.calibration.languages[:count],
        )
        return replace(self, calibration=few)


def memory(job: Job, budget: Budget, process: int) -> Memory:
    """Of the whole run on the CPU. process: resident bytes of one that has opened the model."""
    spilled = budget.spills(job.waiting)
    phases: dict[str, int] = {}
    if job.calibration is not None:
        phases |= _proof(job, budget.proves_whole)
        phases["recording the inputs"] = _record(job, spilled)
    phases["writing the embedding"] = _stream(job, spilled) + _rounding(job)
    embed, layers = _embedding_written(job), written(job)
    # A copied embedding is a view of the mapped file, read when the first layer is kept.
    before = embed + sum(layers[:-1]) if len(layers) > 1 else 0
    held = min(before, max(budget.shard_bytes, embed))
    for name, size in layer_phases(job, spilled).items():
        phases[f"layer: {name}"] = size + held
    streams = (1 + job.needs.twin) * _stream(job, spilled)
    last = min(job.packing.predicted(), max(budget.shard_bytes, embed))
    phases["writing the last shard"] = streams + last
    return Memory(process, phases, spilled, budget.proves_whole, budget.shard_bytes)


def layer_phases(job: Job, spilled: bool) -> dict[str, int]:
    """Bytes alive in the phases of a layer, the largest of all kinds of layers."""
    found: dict[str, int] = {}
    for index in layer_kinds(job.checkpoint, job.plan):
        for name, size in _one_layer(job, index, spilled).items():
            found[name] = max(found.get(name, 0), size)
    return found


def _one_layer(job: Job, index: int, spilled: bool) -> dict[str, int]:
    def run(job: Job) -> dict[str, int]:
        return dry.rehearse(
            job.checkpoint, job.plan, job.packing, index, job.calibration,
            twin=job.needs.twin, spilled=spilled, weights=job.weights,
            careful=job.limited or job.needs.trains,
        ).phases  # fmt: skip

    if job.calibration is None:
        return run(job)
    each = job.calibration.windows_per_chunk * job.calibration.ids.shape[1]
    chunks = job.tokens / each
    if chunks <= _CHUNKS:
        return run(job)
    few, more = run(job.with_chunks(_CHUNKS - 1)), run(job.with_chunks(_CHUNKS))
    return {k: more[k] + int((more[k] - few[k]) * (chunks - _CHUNKS)) for k in more}


def layer_kinds(checkpoint: Checkpoint, plan: Plan) -> dict[int, int]:
    """A layer of every kind -> how many there are: kinds differ in how their Linears are solved and
    in what the family calls them.
    """
    kinds: dict[Any, list[int]] = {}
    named = getattr(checkpoint.config, "layer_types", None)
    for index in range(checkpoint.config.num_hidden_layers):
        prefix = f"{checkpoint.architecture.layers}.{index}."
        own = {k[len(prefix) :]: v for k, v in plan.items() if k.startswith(prefix)}
        key = (named[index] if named else None, tuple(sorted(own.items(), key=lambda kv: kv[0])))
        kinds.setdefault(key, []).append(index)
    return {indices[-1]: len(indices) for indices in kinds.values()}


def written(job: Job) -> list[int]:
    """Bytes that each layer adds to a shard: of its Linears that are written anew; what is copied
    stays in the mapped file.
    """
    found = []
    for index in range(job.checkpoint.config.num_hidden_layers):
        prefix = f"{job.checkpoint.architecture.layers}.{index}."
        names = [name for name in job.plan if name.startswith(prefix)]
        found.append(sum(job.packing.bytes_of(name) for name in names))
    return found


def _proof(job: Job, whole: bool) -> dict[str, int]:
    """proof.prove: logits [windows, keep, vocabulary] n as the model makes them (twice where they
    are scaled) and in fp32; those of the replay wait in fp32 while the model itself runs.
    """
    checkpoint, ids = job.checkpoint, job.calibration.ids
    windows, vocabulary = min(PROOF_WINDOWS, len(ids)), checkpoint.config.vocab_size
    keep = max(1, min(ids.shape[1], LOGIT_ELEMENTS // (windows * vocabulary)))
    n, size = windows * keep * vocabulary, checkpoint.dtype.itemsize
    logits = n * max(2 * size, size + 4 * (size < 4))
    layer, forward = layer_bytes(checkpoint), chunk_bytes(checkpoint, windows * ids.shape[1])
    weights = checkpoint.nbytes + checkpoint.left_out
    if not whole:
        weights = _ends(checkpoint) + truncated_depth(checkpoint.config) * layer
    return {
        "proof, layer by layer": _ends(checkpoint) + max(layer + forward, logits),
        "proof, the model itself": 4 * n + weights + max(forward, logits),
    }


def _record(job: Job, spilled: bool) -> int:
    """driver._record: the embedding as it is read or rounded, the stream, and the final norm of a
    chunk, which runs in fp32 (the input, its centred copy, a square) beside the chunk itself.
    """
    checkpoint = job.checkpoint
    tokens = min(job.tokens, job.calibration.windows_per_chunk * job.calibration.ids.shape[1])
    chunk = tokens * checkpoint.config.hidden_size * (3 * 4 + checkpoint.dtype.itemsize)
    rest = _stream(job, spilled) + chunk
    if not job.packing.ends:
        return _ends(checkpoint) + rest
    rows, columns = checkpoint.entries[f"{checkpoint.architecture.embed}.weight"].shape
    codes, dense = rows * columns, rows * columns * checkpoint.dtype.itemsize
    others = _ends(checkpoint) - dense  # the head, where it is another matrix
    return others + max(_rounding(job) + dense, codes + dense + max(_DENSE_BLOCK, rest))


def _rounding(job: Job) -> int:
    """packing.embedding and encode: the matrix, its codes, a block in two dtypes; then the codes as
    they are written beside those of the grid.
    """
    if not job.packing.ends:
        return 0
    entry = job.checkpoint.entries[f"{job.checkpoint.architecture.embed}.weight"]
    codes = entry.shape[0] * entry.shape[1]
    block = min(EMBED_BLOCK, codes) * (job.checkpoint.dtype.itemsize + 1)
    return max(entry.nbytes + codes + block, 2 * codes)


def _embedding_written(job: Job) -> int:
    """What waits for its shard before any layer does."""
    return job.packing.bytes_of(job.checkpoint.architecture.embed)


def _stream(job: Job, spilled: bool) -> int:
    """The hidden states of all tokens."""
    width = job.checkpoint.config.hidden_size * job.checkpoint.dtype.itemsize
    return 0 if spilled else job.tokens * width


def _ends(checkpoint: Checkpoint) -> int:
    """Embedding and head as they are used: mapped, and once more where another dtype is run."""
    total = 0
    for name in (checkpoint.architecture.embed, checkpoint.architecture.head):
        entry = checkpoint.entries.get(f"{name}.weight")
        if entry is not None and not (name == checkpoint.architecture.head and checkpoint.tied):
            numbers = entry.shape[0] * entry.shape[1]
            other = entry.dtype != checkpoint.dtype
            total += entry.nbytes + other * numbers * checkpoint.dtype.itemsize
    return total


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Weights of the first layer."""
    prefix = f"{checkpoint.architecture.layers}.0."
    return sum(e.nbytes for name, e in checkpoint.entries.items() if name.startswith(prefix))
