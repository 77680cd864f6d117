"""What the cost model says of 1 to 8 GPUs and of models that no machine here can hold: computed.

    python bench/scaling.py --arithmetic [--docs]

Nothing here is measured. Bytes between ranks and memory are counted by distaya_ext/planning from
the shapes of a checkpoint without weights. Seconds are operations over the vendor's peak rates, of
which ASSUMED says what share is supposed to be reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CohereConfig

from distaya_ext import Recipe
from distaya_ext.checkpoint import Checkpoint
from distaya_ext.checkpoint.entry import Entry
from distaya_ext.compress import Calibration
from distaya_ext.compress.budget import GIB, needs_of
from distaya_ext.compress.calibrate import CUDA_CHUNK_TOKENS
from distaya_ext.compress.packing import Packing
from distaya_ext.compress.phases import Job, layer_bytes, layer_kinds, written
from distaya_ext.compress.plan import groups, make_plan
from distaya_ext.compress.reconstruct import BATCH_TOKENS, EPOCHS
from distaya_ext.models.skeleton import build_skeleton
from distaya_ext.planning import factors
from distaya_ext.planning.passed import ends_block, learned, shape_of
from distaya_ext.planning.scaling import PARTS, AtRanks, Costs, Scaling, simulate
from distaya_ext.planning.times import passes
from distaya_ext.planning.wire import Wire
from distaya_ext.planning.work import Work

# An H100 SXM as its vendor states it: bf16 dense and fp32 operations, bytes of its memory, and of
# NVLink 4 into one GPU, per second.
PEAK = {"bf16": 989e12, "fp32": 67e12, "memory": 3.35e12, "nvlink": 450e9}
# Shares of these that are supposed; none of them is measured.
ASSUMED = {"bf16": 0.4, "fp32": 0.5, "factor": 0.25, "memory": 0.7, "nvlink": 0.6}
DISK_READ, DISK_WRITE = 5e9, 2e9  # bytes a second of one shared disk, supposed
HOST = 2e9  # between the hosts' memories, through which weights are passed on, supposed
STEP_BYTES = 48  # that a step of training moves for each number it trains
GPU = 80e9
WORLDS = (1, 2, 4, 8)
WINDOWS, LENGTH = 128, 2048
# hidden, intermediate, layers, heads, kv heads, vocabulary
MODELS = {
    "Aya-Expanse-8B": (4096, 14336, 32, 32, 8, 256000),
    "Aya-Expanse-32B": (8192, 24576, 40, 64, 8, 256000),
    "Command R+ (104B)": (12288, 33792, 64, 96, 8, 256000),
}
RECIPES: dict[str, dict[str, Any]] = {
    "default, 2:4 + int4": {"method": "sparsegpt", "nm": "2:4", "bits": 4},
    "high, 2:4": {"method": "sparsegpt", "nm": "2:4", "quality": "high"},
}


@dataclass(frozen=True)
class Row:
    """A model, a recipe, what is simulated of it; away: whether activations wait on the host."""

    model: str
    recipe: str
    found: Scaling
    away: dict[int, bool]
    depth: int


def shapes(sizes: tuple[int, ...]) -> Checkpoint:
    """A bf16 checkpoint of that shape, of which there are no weights."""
    hidden, ff, layers, heads, kv_heads, vocabulary = sizes
    config = CohereConfig(
        hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        tie_word_embeddings=True, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    nowhere, dtype = Path("nowhere"), torch.bfloat16
    entries = {
        name: Entry(nowhere, tuple(tensor.shape), dtype)
        for name, tensor in build_skeleton(config, dtype).state_dict().items()
        if name != "lm_head.weight"
    }
    return Checkpoint(nowhere, config, dtype, entries, tied=True)


def job_of(checkpoint: Checkpoint, fields: dict[str, Any]) -> Job:
    """As `distaya plan --device cuda` makes it, with windows that say nothing."""
    recipe = Recipe(model="shapes", **fields)
    plan = make_plan(recipe, checkpoint, checkpoint.config.num_hidden_layers)
    ids = torch.zeros(WINDOWS, LENGTH, dtype=torch.int64)
    calibration = Calibration(ids, ["en"] * WINDOWS, chunk_tokens=CUDA_CHUNK_TOKENS)
    packing = Packing(recipe, plan, checkpoint)
    return Job(checkpoint, packing.plan, packing, needs_of(recipe, plan, checkpoint), calibration)


def work_of(job: Job, index: int) -> Work:
    """Operations of a layer over the rates that are supposed."""
    prefix = f"{job.checkpoint.architecture.layers}.{index}"
    hidden, streams = job.checkpoint.config.hidden_size, 1 + job.needs.twin
    bf16, fp32 = (PEAK[kind] * ASSUMED[kind] for kind in ("bf16", "fp32"))
    weights = products = factor = inverse = rows_work = trained = 0.0
    attention = 2.0 * LENGTH * hidden  # of a token, which sees half the window in the mean
    for stage in job.checkpoint.architecture.stages:
        rows, columns = shape_of(job, prefix, list(stage.names))
        weights += rows * columns
        settings = job.plan[f"{prefix}.{stage.names[0]}"]
        products += columns**2  # the triangle of x x^T
        if settings.aims:
            products += 2.0 * columns * (rows if ends_block(job, stage) else columns)
        for names in groups(job.plan, prefix, stage.names):
            own = job.plan[f"{prefix}.{names[0]}"]
            rows, _ = shape_of(job, prefix, names)
            rows_work += 2.0 * passes(own) * rows * columns**2
            trained += learned(own, rows, columns)
    for columns, once, inverses in factors.of_layer(job.checkpoint, job.plan, index):
        factor += once * columns**3 / 3 / (PEAK["fp32"] * ASSUMED["factor"])
        inverse += inverses * 2.0 * columns**3 / fp32
    step = STEP_BYTES * weights / (PEAK["memory"] * ASSUMED["memory"]) / BATCH_TOKENS
    training = EPOCHS * (3 * (2 * weights + attention) / bf16 + step)
    return Work(
        read=layer_bytes(job.checkpoint) / DISK_READ,
        token=(streams * (2 * weights + attention) + products) / bf16,
        factor=factor,
        inverse=inverse,
        rows=rows_work / fp32,
        train=training if trained else 0.0,
        write=2 * written(job)[index] / DISK_WRITE,
    )


def rows() -> Iterator[Row]:
    """One for every model and recipe."""
    wire = Wire(PEAK["nvlink"] * ASSUMED["nvlink"], "supposed")
    for model, sizes in MODELS.items():
        checkpoint = shapes(sizes)
        for recipe, fields in RECIPES.items():
            job = job_of(checkpoint, fields)
            kinds = layer_kinds(job.checkpoint, job.plan)
            works = {index: work_of(job, index) for index in kinds}
            found = simulate(job, WORLDS, wire, Costs(works, late=True, weights=HOST))
            away = {row.ranks: row.memory > GPU for row in found.rows}
            yield Row(model, recipe, found, away, sum(kinds.values()))


def text(found: Iterator[Row]) -> str:
    """Markdown: a table for every model, and what was supposed."""
    heads = ["recipe", "GPUs", *PARTS, "layer", "all layers", "efficiency", "sent", "memory"]
    lines = [_supposed(), ""]
    model = None
    for row in found:
        if row.model != model:
            model = row.model
            lines += ["", f"**{model}**, {row.depth} layers (simulated):", ""]
            lines += ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
        lines += [_line(row, each) for each in row.found.rows]
    return "\n".join(lines)


def _line(row: Row, each: AtRanks) -> str:
    held = f"{each.memory / GIB:.0f} GiB"
    if row.away[each.ranks]:
        held += " *"
    seconds = [f"{each.parts[part]:.2g}" for part in PARTS]
    minutes = f"{(each.seconds - each.outside) / 60:.1f} min"
    sent = f"{sum(own for own, _ in each.bytes.values()) / GIB:.2f} GiB"
    cells = [row.recipe, str(each.ranks), *seconds, f"{each.layer:.2f} s", minutes]
    return "| " + " | ".join([*cells, f"{each.efficiency:.2f}", sent, held]) + " |"


def _supposed() -> str:
    of = {"bf16": "bf16 products", "fp32": "fp32 products", "factor": "fp32 in Cholesky factors"}
    of |= {"memory": "memory", "nvlink": "NVLink"}
    shares = ", ".join(f"{100 * ASSUMED[kind]:.0f} % of the peak for {of[kind]}" for kind in of)
    return (
        f"Simulated, not measured: {WINDOWS} windows of {LENGTH} tokens on H100 SXM GPUs of one "
        f"node. Peaks of the vendor: {PEAK['bf16'] / 1e12:.0f} TFLOP/s dense bf16, "
        f"{PEAK['fp32'] / 1e12:.0f} fp32, {PEAK['memory'] / 1e12:.2f} TB/s memory, "
        f"{PEAK['nvlink'] / 1e9:.0f} GB/s NVLink each way. Supposed: {shares}; a disk of "
        f"{DISK_READ / 1e9:.0f} GB/s to read and {DISK_WRITE / 1e9:.0f} to write, "
        f"{HOST / 1e9:.0f} GB/s for weights between processes of the host. Seconds are those of a "
        "layer; reading and writing go on beside the rest. sent: of a rank for a layer. memory: of "
        "each GPU at most; * where it is more than 80 GB, so that activations wait on the host."
    )
