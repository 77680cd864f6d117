"""What the user should know of a training before its first step."""

from __future__ import annotations

from typing import Any

import torch

from .loop import Loop
from .optimiser import precision


def notes(loop: Loop, state: dict[str, Any] | None) -> list[str]:
    """A sentence each; state: of the checkpoint that the run goes on from."""
    found = []
    if loop.rows > len(loop.training):
        found.append(
            f"a step takes {loop.rows} rows and there are {len(loop.training)}, so rows repeat "
            "within it"
        )
    if loop.precision != precision("auto", loop.device) == "float32":
        found.append("this machine has no bfloat16 products; they are emulated, which takes longer")
    if state is not None and state["threads"] != torch.get_num_threads():
        found.append(
            f"the checkpoint was made with {state['threads']} threads and this run has "
            f"{torch.get_num_threads()}, so it may end with other last bits"
        )
    parts = loop.dealt.parts.count
    if state is not None and (before := state.get("parts", 1)) != parts:
        found.append(
            f"the checkpoint was made by a run whose steps were summed in {before} parts, and now "
            f"there are {parts}, so it may end with other last bits"
        )
    sharded = loop.whole.shards is not None
    if state is not None and state.get("sharded", False) != sharded:
        found.append(
            f"what learns was {'whole' if sharded else 'sharded'} where the checkpoint was made "
            f"and is {'sharded' if sharded else 'whole'} now, so it may end with other last bits"
        )
    if loop.spec.shard != "none" and not sharded:
        found.append("there is one process, so nothing is sharded")
    return found
