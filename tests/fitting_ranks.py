"""What the tests of training by several ranks share: uneven rows, and how two runs are compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ranked
import torch
from fitting import spec
from tiny import windows

from distaya_ext.train.data import IGNORED, TrainingData

ranked._context.set_forkserver_preload(
    ["torch.distributed", "transformers.trainer", "distaya_ext.train.distill", "peft"]
)
CLOCK = ("seconds", "tokens_per_second")


def ragged(rows: int = 15) -> tuple[TrainingData, TrainingData]:
    """Rows with up to 16 labels, every other one with none, and 5 to be held out."""
    ids = windows(rows + 5).ids
    numbers = torch.arange(rows + 5)
    mask = torch.arange(24) < ((numbers * 7 % 24) * (numbers % 2) + 1)[:, None]
    labels = torch.where(mask & (torch.arange(24) % 3 > 0), ids, IGNORED)
    whole = TrainingData(ids * mask, labels, mask, ["en"] * (rows + 5))
    return whole.take(numbers[:rows]), whole.take(numbers[rows:], first=rows)


# 7 rows a step in micro-batches of up to two: of 3 parts they make 1, 1 and 2.
UNEVEN = spec(batch_tokens=7 * 24, micro_tokens=48, weight_decay=0.01, schedule="constant")


def hashes(work: Path) -> dict[str, Any]:
    """Of everything a run leaves but what tells of times, and its metrics without them."""
    found: dict[str, Any] = {}
    for path in sorted(work.rglob("*.safetensors")):
        found[str(path.relative_to(work))] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    return found


def plain(course: Any) -> dict[str, Any]:
    return {k: v for k, v in course.to_dict().items() if k not in (*CLOCK, "ranks")}


def off(found: dict, there: dict, start: dict) -> float:
    """Squared distance of two ends over that of the way to one of them."""
    apart = sum(float((found[n] - p).square().sum()) for n, p in there.items())
    return apart / sum(float((start[n] - p).square().sum()) for n, p in there.items())


class Told(Exception):
    """SIGTERM as it was before the training."""
