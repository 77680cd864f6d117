"""How much memory a run takes beside its activations, and how much that leaves for them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..errors import ResourceError, UsageError
from ..ranks import team
from ..recipe import Recipe
from .calibrate import CHUNK_TOKENS, CUDA_CHUNK_TOKENS
from .plan import Plan, shares_statistics
from .reconstruct import BATCH_TOKENS

GIB = 1 << 30
MIB = 1 << 20
_INTERPRETER = 512 * MIB  # Python, torch and transformers themselves
_LEAST_SHARD = 64 * MIB  # weights held until a shard is written
_CONTEXT = GIB  # CUDA's own, and the work spaces of its libraries
# Per weight of a stage at work on a GPU: its stack, a copy, the result and what goes home in the
# model's 2 bytes; mask, codes; the errors in fp32; places of a bitmask's codes.
_SOLVING = 4 * 2 + 1 + 1 + 4 + 1
# Per weight: the target, the sweep's result, and the refit's residual, direction, product and sum,
# in fp32; its mask, and the error whose loss is taken.
_REFINING = 4 * (1 + 1 + 4 + 1) + 1
# Per weight: the trained copy, its gradient, Adam's two, the best so far, the mask and the product.
_TRAINING = 4 * 7
_SAVED = 12  # per number inside the layer's forward, for the gradient: in 16 bits and in fp32
_WHOLE_PROOF = 2 * GIB  # without a limit, models up to this size are proved against the whole model


@dataclass(frozen=True)
class Needs:
    """What a run does that takes memory. shared: some stage is solved in several stacks, see
    plan.shares_statistics; twin: the dense model's stream is carried along; trains: layers are
    trained (quality high).
    """

    shared: bool = False
    twin: bool = False
    trains: bool = False


_FEW = Needs()


def needs_of(recipe: Recipe, plan: Plan, checkpoint: Checkpoint) -> Needs:
    """What a run of this recipe does; plan: of its Linears."""
    return Needs(
        shared=shares_statistics(plan, checkpoint),
        twin=recipe.calibration.weights == "worst" or any(s.aims for s in plan.values()),
        trains=any(s.quality == "high" for s in plan.values()),
    )


class Budget:
    """Bytes for each purpose under a limit (None = no limit). UsageError when it is too small."""

    def __init__(self, checkpoint: Checkpoint, limit: int | None, needs: Needs = _FEW):
        least = least_bytes(checkpoint, needs)
        if limit is not None and limit < least:
            raise UsageError(
                f"this model needs at least {least / GIB:.2f} GiB to be compressed "
                f"layer by layer; max_ram allows {limit / GIB:.2f} GiB"
            )
        self.shard_bytes = GIB if limit is None else min(GIB, _LEAST_SHARD + (limit - least) // 8)
        self.room = None if limit is None else limit - least - (self.shard_bytes - _LEAST_SHARD)
        # The proof against the whole model holds it once, and once more while it is loaded.
        whole = checkpoint.nbytes + checkpoint.left_out
        self.proves_whole = whole <= (_WHOLE_PROOF if limit is None else self.room // 2)

    def spills(self, activation_bytes: int) -> bool:
        """Whether activations of that size must go to disk.

        Without a limit they may fill a quarter of the memory, those of all processes of this host
        together; the result is the same either way.
        """
        shared = physical_bytes() // (4 * team().local_world)
        room = shared if self.room is None else self.room
        return activation_bytes > room


def physical_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_disk(folder: Path, needed: int) -> None:
    """ResourceError when the disk that holds the result and spilled activations is too full."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"the run writes {needed / GIB:.2f} GiB beside the output folder "
            f"and only {free / GIB:.2f} GiB are free there"
        )


def least_bytes(checkpoint: Checkpoint, needs: Needs = _FEW) -> int:
    """The smallest limit under which the model can be compressed.

    The embedding is read, proved with and copied before the first layer, so only the larger counts.
    """
    embed = checkpoint.entries[f"{checkpoint.architecture.embed}.weight"].nbytes
    return _INTERPRETER + _LEAST_SHARD + max(2 * embed, working_bytes(checkpoint, needs))


def working_bytes(checkpoint: Checkpoint, needs: Needs = _FEW) -> int:
    """One layer and its largest stage at work: weights, stacked copies, two square matrices (three
    where stacks share a Hessian), one chunk; with a twin its weights, moments, target and refit,
    and its chunk.
    """
    square, weight = _per_square(needs), 8 + (_REFINING if needs.twin else 0)
    prefix = f"{checkpoint.architecture.layers}.0."
    layer = {k[len(prefix) :]: e for k, e in checkpoint.entries.items() if k.startswith(prefix)}
    worst = _training_bytes(checkpoint) if needs.trains else 0
    for stage in checkpoint.architecture.stages:
        shapes = [layer[f"{name}.weight"].shape for name in stage.names]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        worst = max(worst, square * columns * columns + weight * rows * columns)
    streams = 1 + needs.twin
    held = (1 + streams) * sum(entry.nbytes for entry in layer.values())
    return held + worst + streams * chunk_bytes(checkpoint)


def _per_square(needs: Needs) -> int:
    """Bytes per entry of a square matrix: H and its factor, a copy, two cross moments."""
    return 8 + 4 * needs.shared + 8 * needs.twin


def _training_bytes(checkpoint: Checkpoint) -> int:
    """A layer's weights as they are trained, and a batch with what its gradient needs."""
    weights = sum(rows * columns for rows, columns in _linears(checkpoint).values())
    return _TRAINING * weights + _SAVED * BATCH_TOKENS * outputs_per_token(checkpoint)


def outputs_per_token(checkpoint: Checkpoint) -> int:
    """Numbers per token inside a layer's forward: its input and all Linear outputs."""
    return checkpoint.config.hidden_size + sum(rows for rows, _ in _linears(checkpoint).values())


def waiting_per_token(checkpoint: Checkpoint) -> int:
    """Numbers per token that wait between the passes over a layer: its input, the outputs of the
    blocks that have run, and the input of the last Linear of the one that runs.
    """
    shapes, kept, most = _linears(checkpoint), 0, 0
    for block in checkpoint.architecture.blocks:
        rows, columns = [shape for name, shape in shapes.items() if name.startswith(block)][-1]
        most = max(most, kept + columns)
        kept += rows
    return checkpoint.config.hidden_size + max(most, kept)


def _linears(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Shapes of the Linears of the first layer, in stage order."""
    prefix = f"{checkpoint.architecture.layers}.0."
    names = checkpoint.architecture.linears()
    return {name: checkpoint.entries[f"{prefix}{name}.weight"].shape for name in names}


def chunk_bytes(checkpoint: Checkpoint, tokens: int | None = None) -> int:
    """One chunk inside a layer's forward, with room for fp32 copies."""
    return 4 * (tokens or CHUNK_TOKENS) * outputs_per_token(checkpoint)


def activation_bytes(checkpoint: Checkpoint, tokens: int, needs: Needs = _FEW) -> int:
    """All calibration tokens waiting between two passes, in the run's dtype."""
    return (1 + needs.twin) * tokens * waiting_per_token(checkpoint) * checkpoint.dtype.itemsize


# ---- a GPU's memory ----


def device_bytes(checkpoint: Checkpoint, tokens: int, needs: Needs = _FEW) -> int:
    """What a run takes on a GPU with the activations of so many tokens waiting there (0: none).

    Three layers' weights: at work, coming, and not yet given back. Then the larger of a chunk's
    forward, the largest stage at work with its Hessian, and the layer in training; all on top of
    what waits.
    """
    prefix = f"{checkpoint.architecture.layers}.0."
    layer = sum(e.nbytes for name, e in checkpoint.entries.items() if name.startswith(prefix))
    streams = 1 + needs.twin
    forward, squares = streams * chunk_bytes(checkpoint, CUDA_CHUNK_TOKENS), 0
    solving = _training_bytes(checkpoint) if needs.trains else 0
    square, weight = _per_square(needs), _SOLVING + (_REFINING if needs.twin else 0)
    for stage in checkpoint.architecture.stages:
        shapes = [_linears(checkpoint)[name] for name in stage.names]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        squares = max(squares, 4 * streams * columns * columns)
        solving = max(solving, square * columns * columns + weight * rows * columns)
    embed = checkpoint.entries[f"{checkpoint.architecture.embed}.weight"].nbytes
    work = (2 + streams) * layer + max(forward + squares, solving)
    return _CONTEXT + activation_bytes(checkpoint, tokens, needs) + max(embed, work)


def waits_on_host(
    checkpoint: Checkpoint,
    tokens: int,
    device: torch.device,
    needs: Needs = _FEW,
    limit: int | None = None,
) -> bool:
    """Whether the activations of so many tokens must wait in the host's memory. limit: bytes of the
    GPU's that may be used at most; with one the GPU need not be here.

    ResourceError when the GPU is too small for the work without them.
    """
    here = limit is None or torch.cuda.is_available()
    free = torch.cuda.mem_get_info(device)[0] if here else limit
    capped = limit is not None and limit < free
    free = limit if capped else free
    least = device_bytes(checkpoint, 0, needs)
    if free < least:
        raise ResourceError(
            f"compressing this model takes at least {least / GIB:.1f} GiB of GPU memory and "
            + (
                f"max_vram allows {free / GIB:.1f} GiB"
                if capped or not here
                else f"{free / GIB:.1f} GiB are free on {device}"
            )
        )
    return free < device_bytes(checkpoint, tokens, needs)
