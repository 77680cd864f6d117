"""compress(): what everyone calls. A plain recipe is one walk through the layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipe import Recipe
from . import driver
from .report import Report

if TYPE_CHECKING:
    from ..chain import Chained


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    texts: Any = None,
    *,
    on_event: Callable[[Any], None] | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str = "cpu",
    offline: bool = False,
    strict: bool = False,
    spill: str | Path | None = None,
) -> Report | Chained:
    """Compress a model layer by layer and write it to the folder `out`.

    model      local Hugging Face folder or hub id (offline=True: the hub's local cache only)
    texts      folder of <lang>.txt, .jsonl or .parquet, token windows as texts.windows returns
               them, or None for the recipe's folder; magnitude, rtn and dense need none. A folder
               is noted in the recipe that is written, so that this repeats the run bit for bit
    on_event   is called with the records of compress.events as the run goes
    overwrite  replaces an older result of ours
    device     "cpu" or "cuda"
    strict     NumericsError at the first module that is degraded, nothing is written then; what
               counts as degraded is in compress.fallbacks. Decides nothing of the result
    spill      folder where activations wait that the memory does not hold, such as a disk of this
               machine; None: beside `out`

    Only the embedding and one decoder layer are in memory at a time; a proof first shows that layer
    by layer gives the model's own logits. `out` appears when it is complete. Until then what is
    done is kept in a hidden folder beside it (see compress.keep): the same call goes on where a run
    was stopped, and writes the same weights; restart=True begins anew.

    A recipe that chooses layers by score, heals or evaluates is a chain of steps, and a Chained is
    returned: each finished step is kept, too, and on_progress is told how far an evaluation is. See
    chain.run_chain.

    In several processes (torchrun, ranks.joined) all of them call this with the same arguments.
    Each runs its share of the windows and of the rows, rank 0 writes, and `out` and what is kept
    beside it must lie where all of them can see it; see docs/scaling.md.

    Where something lesser than asked was done, it is in `fallbacks` of the report.

    Raises InputError or UsageError (both ValueError) in one sentence.
    """
    if recipe.chained:
        from ..chain import run_chain

        return run_chain(
            model, out, recipe, texts, on_event=on_event, on_progress=on_progress,
            overwrite=overwrite, restart=restart, device=device, offline=offline, strict=strict,
            spill=None if spill is None else Path(spill),
        )  # fmt: skip
    return driver.compress(
        model, out, recipe, texts, on_event=on_event, overwrite=overwrite, restart=restart,
        device=device, offline=offline, strict=strict,
        spill=None if spill is None else Path(spill),
    )  # fmt: skip
