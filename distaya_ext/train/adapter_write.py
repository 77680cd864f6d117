"""Writing what was learnt as a PEFT adapter folder; needs no peft."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import MARKER, Staging
from ..checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..errors import UsageError
from ..finished import complete
from .adapter import ABOVE, MASKED
from .learned import Learned, LowRank


def write_adapter(learned: Learned, out: str | Path, *, overwrite: bool = False) -> Path:
    """What was learnt as a PEFT adapter folder alone, without a model; returns it.

    Norms and embeddings go along as PEFT's modules_to_save. UsageError for what an adapter cannot
    hold: scales, and full training.
    """
    if learned.scales:
        raise UsageError(
            f"an adapter cannot hold the scales of {len(learned.scales)} matrices; write the model"
        )
    if not learned.low_rank:
        raise UsageError("there is no LoRA to keep as an adapter; write the model")
    with Staging(Path(out), overwrite=overwrite) as staging:
        put_adapter(staging.model, learned.low_rank, learned.tensors, masked=learned.masked)
        marker = f"{MARKER}: none, this is an adapter\n"
        (staging.model / "recipe.yaml").write_text(marker, encoding="utf-8")
        complete(staging.model, "training")
        staging.publish()
    return Path(out)


def put_adapter(
    folder: Path,
    low_rank: Mapping[str, LowRank],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    masked: bool = False,
) -> int:
    """Write the two files into a folder, which is made; returns the bytes of the weights."""
    folder.mkdir(exist_ok=True)
    held: dict[str, Tensor] = {}
    for name, each in low_rank.items():
        held[f"{ABOVE}{name}.lora_A.weight"] = each.A.contiguous()
        held[f"{ABOVE}{name}.lora_B.weight"] = each.B.contiguous()
    for name, tensor in (tensors or {}).items():
        held[f"{ABOVE}{name}"] = tensor.contiguous()
    about = {"format": "pt"} | ({MASKED: "true"} if masked else {})
    save_file(held, folder / ADAPTER_WEIGHTS, metadata=about)
    text = json.dumps(_config(low_rank, tensors or {}), indent=2) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    return (folder / ADAPTER_WEIGHTS).stat().st_size


def _config(low_rank: Mapping[str, LowRank], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """adapter_config.json, in PEFT's words; one rank and alpha, and what differs from them."""
    sizes = {name: (each.rank, each.alpha) for name, each in low_rank.items()}
    rank, alpha = next(iter(sizes.values()))
    exact = {f"^{re.escape(name)}": size for name, size in sizes.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": sorted(low_rank),
        "rank_pattern": {name: size[0] for name, size in exact.items() if size[0] != rank},
        "alpha_pattern": {name: size[1] for name, size in exact.items() if size[1] != alpha},
        "modules_to_save": sorted({name.rpartition(".")[0] for name in tensors}) or None,
    }
