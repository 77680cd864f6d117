"""From a rehearsal to the time of a run, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint import Checkpoint
from ..compress.phases import Job, layer_kinds, written
from ..compress.plan import groups
from ..compress.settings import Settings
from ..errors import DistayaError
from ..recipe import Recipe
from .clock import Rehearsal
from .scaling import Costs

# The runs of bench/results/plan.json took 1.03 to 1.61 times the estimate: what happens between
# layers is not in it.
LEAST, MOST = 0.9, 1.7
_LEARNING = 4  # forwards that a step of healing takes: the student's, its gradient (2), the teacher
_MODELS = 2  # that an evaluation runs: the result and the model before


def layer_work(checkpoint: Checkpoint, plan: Mapping[str, Settings], index: int) -> float:
    """Multiplications that solving a layer takes, about: of a Hessian of c columns the factor c^3,
    each pass over r rows r c^2.
    """
    total, prefix = 0.0, f"{checkpoint.architecture.layers}.{index}"
    for stage in checkpoint.architecture.stages:
        for names in groups(plan, prefix, stage.names):
            settings = plan[f"{prefix}.{names[0]}"]
            shapes = [checkpoint.entries[f"{prefix}.{name}.weight"].shape for name in names]
            rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
            total += rows * columns * 64  # scores, rounding, packing
            if settings.statistic == "hessian":
                factors = 10 if settings.quality == "high" and settings.pattern is not None else 1
                total += factors * columns**3 + passes(settings) * rows * columns**2
    return total


def passes(settings: Settings) -> int:
    """Products rows x columns^2 that solving by a Hessian takes, about."""
    prunes = settings.pattern is not None
    return {"plain": 1, "default": 4 + 12 * prunes, "high": 5 + 42 * prunes}[settings.quality]


@dataclass(frozen=True)
class Estimate:
    """Seconds, by step; low and high bound the sum. based_on: what was measured."""

    steps: dict[str, float]
    based_on: str

    @property
    def seconds(self) -> float:
        return sum(self.steps.values())

    @property
    def low(self) -> float:
        return LEAST * self.seconds

    @property
    def high(self) -> float:
        return MOST * self.seconds

    def to_dict(self) -> dict[str, Any]:
        told = {"seconds": self.seconds, "low": self.low, "high": self.high}
        return {**told, "steps": self.steps, "based_on": self.based_on}


def estimate(
    job: Job, recipe: Recipe, rehearsal: Rehearsal, startup: float, output: int, source: Checkpoint
) -> Estimate:
    """Of a whole run. source: the checkpoint with all its layers."""
    worst = layer_work(job.checkpoint, job.plan, rehearsal.layer)
    layers = 0.0
    for index, count in layer_kinds(job.checkpoint, job.plan).items():
        share = layer_work(job.checkpoint, job.plan, index) / worst if worst else 1.0
        layers += count * rehearsal.of_layer(job.tokens, share)
    depth = source.config.num_hidden_layers
    steps: dict[str, float] = {"start": startup}
    if not isinstance(recipe.drop_layers, list):
        spec = recipe.drop_layers
        passes = 1.0
        if spec.score in ("kl", "ppl"):
            gone = spec.count or max(1, int(depth * (spec.share or 0)))
            rounds = gone if spec.greedy else 1
            passes += depth * rounds / 2  # a layer that is left out costs those behind it
        steps["drop"] = passes * spec.tokens * depth * rehearsal.forward
    steps |= _ends(job, rehearsal, source)
    steps["layers"] = layers
    steps["write"] = 2 * output * rehearsal.disk  # each layer once for resuming, then its shard
    left = job.checkpoint.config.num_hidden_layers
    if recipe.heal is not None:
        tokens = recipe.heal.steps * recipe.heal.batch_tokens
        steps["heal"] = _LEARNING * tokens * left * rehearsal.forward
    if recipe.evaluate is not None:
        tokens = recipe.evaluate.tokens or _all_tokens(recipe, source)
        models = _MODELS * (1 + (recipe.heal is not None))
        steps["evaluate"] = models * tokens * left * rehearsal.forward
    based = (
        f"layer {rehearsal.layer} run in full on {rehearsal.tokens} tokens: {rehearsal.solve:.2f} s"
        f" to solve it, {1e3 * rehearsal.per_token:.3f} ms for a token"
        if rehearsal.tokens
        else f"layer {rehearsal.layer} run in full: {rehearsal.solve:.2f} s"
    )
    return Estimate(steps, based)


def costs(job: Job, rehearsal: Rehearsal, startup: float, output: int, source: Checkpoint) -> Costs:
    """The compression alone, as scaling.simulate takes it; of one process it is what estimate()
    gives for start, proof, record, layers and write.
    """
    worst, sizes = layer_work(job.checkpoint, job.plan, rehearsal.layer), written(job)
    works = {}
    for index in layer_kinds(job.checkpoint, job.plan):
        share = layer_work(job.checkpoint, job.plan, index) / worst if worst else 1.0
        work = rehearsal.work(share)
        works[index] = replace(work, write=work.write + 2 * sizes[index] * rehearsal.disk)
    kinds = layer_kinds(job.checkpoint, job.plan)
    rest = output - sum(sizes[index] * count for index, count in kinds.items())
    steps = _ends(job, rehearsal, source)
    alone = startup + steps.get("proof", 0.0) + 2 * max(0, rest) * rehearsal.disk
    return Costs(works, alone, steps.get("record", 0.0))


def _ends(job: Job, rehearsal: Rehearsal, source: Checkpoint) -> dict[str, float]:
    """Seconds of what comes before the layers."""
    if job.calibration is None:
        return {}
    depth = min(source.config.num_hidden_layers, job.checkpoint.config.num_hidden_layers)
    proof = rehearsal.proof * depth / rehearsal.proof_layers
    return {"proof": proof, "record": rehearsal.embed * job.tokens}


def _all_tokens(recipe: Recipe, source: Checkpoint) -> int:
    """Tokens of the texts of an evaluation, 0 where they cannot be read as texts."""
    from ..documents import read_texts
    from ..tokenizer import load_tokenizer

    try:
        texts = read_texts(recipe.evaluate.path, parallel=recipe.evaluate.per_line)
        tokenizer = load_tokenizer(source.folder, source.config.vocab_size)
    except DistayaError:
        return 0
    documents = [text for found in texts.values() for text in found]
    return sum(len(tokenizer(text)["input_ids"]) for text in documents)
