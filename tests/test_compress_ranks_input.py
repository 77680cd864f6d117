"""Ranks that do not fit each other, or the work: a sentence on every rank, and no hang."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranked import Ranks, run_ranks
from safetensors.torch import load_file, save_file
from test_compress_ranks import run, weights
from test_skipped_windows import calibration, hot_model

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import compress
from distaya_ext.compress.budget import Needs, least_bytes
from distaya_ext.ranks import team

FIELDS: dict[str, Any] = {"nm": "2:4"}


def sentences(world: int, function: Any, *args: Any, timeout: float = 60) -> list[tuple[str, str]]:
    """(kind, sentence) of the error that each rank ended with."""
    ends = Ranks(world, function, *args).ends(timeout)
    assert not any(good for good, _ in ends), ends
    return [what[:2] for _, what in ends]


def test_more_ranks_than_windows(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    for kind, said in sentences(3, run, source, tmp_path / "out", FIELDS, None, 2):
        assert kind == "UsageError"
        assert "3 processes were started" in said and "2 windows of 24 tokens" in said
    assert not (tmp_path / ".out.compress").exists() and not (tmp_path / "out").exists()


def test_more_parts_than_windows(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    (found,) = sentences(1, run, source, tmp_path / "out", FIELDS, 13, 12)
    assert found[0] == "UsageError" and "calibration.parts is 13" in found[1]


def without_a_shard(source: Path, out: Path) -> None:
    """Rank 1 looks into another folder of the same name, where a file is missing."""
    run(source if team().first else source.parent / "elsewhere" / "model", out, FIELDS, None)


def test_a_rank_with_a_missing_file(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    other = tiny.make(tmp_path / "elsewhere" / "model", tiny.FAMILIES["cohere"])
    (other / "model.safetensors").unlink()
    first, second = sentences(2, without_a_shard, source, tmp_path / "out")
    assert second[0] == "InputError" and "safetensors" in second[1]
    assert first[0] == "LostError" and "rank 1 of 2" in first[1] and second[1] in first[1]
    assert not (tmp_path / "out").exists()


def test_ranks_with_different_models(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    other = tiny.make(tmp_path / "elsewhere" / "model", tiny.FAMILIES["cohere"])
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for kind, said in sentences(2, without_a_shard, source, tmp_path / "out"):
        assert kind == "UsageError" and "rank 1" in said and "model.safetensors" in said


def with_another_recipe(source: Path, out: Path) -> None:
    run(source, out, {"nm": "2:4" if team().first else "4:8"}, None)


def test_ranks_with_different_recipes(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    for kind, said in sentences(2, with_another_recipe, source, tmp_path / "out"):
        assert kind == "UsageError" and "rank 1" in said and "recipe.nm" in said and "4:8" in said


def with_another_output(source: Path, out: Path) -> None:
    run(source, out if team().first else out.parent / "mine" / "out", FIELDS, None)


def test_an_output_that_ranks_do_not_share(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    for kind, said in sentences(2, with_another_output, source, tmp_path / "out"):
        assert kind == "UsageError" and "rank 1 of 2" in said and "share" in said


# ---- what one process does, too ----


def hot(source: Path, out: Path, bad: list[int], quality: str) -> dict[str, Any]:
    recipe = tiny.recipe(nm="2:4", quality=quality, calibration={"tokens": 1 << 20, "parts": 2})
    return compress(source, out, recipe, calibration(110, bad)).summary()


@pytest.mark.parametrize("quality", ["default", "high"])
def test_windows_that_overflow_are_left_out_by_all(quality: str, tmp_path: Path) -> None:
    source = hot_model(tmp_path / "model")
    (one,) = run_ranks(1, hot, source, tmp_path / "one", [70], quality)
    two = run_ranks(2, hot, source, tmp_path / "two", [70], quality)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    for found in two:
        assert found["fallbacks"] == one["fallbacks"] and found["fallbacks"]["kinds"]


def test_too_many_that_overflow_on_different_ranks(tmp_path: Path) -> None:
    """Each rank has one of its own, which alone is no reason to end."""
    source = hot_model(tmp_path / "model")
    for kind, said in sentences(2, hot, source, tmp_path / "out", [3, 70], "default"):
        assert kind == "InputError" and "2 of 110 calibration windows" in said


def spilling(source: Path, out: Path, spill: Path, limit: str) -> tuple[bool, list[str]]:
    from distaya_ext.compress import store

    folders: list[str] = []
    real = store.Store.__init__

    def noted(self: Any, folder: Path | None = None, **more: Any) -> None:
        real(self, folder, **more)
        folders.append(str(self.folder))

    store.Store.__init__ = noted
    own = spill / f"disk{team().rank}"
    report = run(source, out, {**FIELDS, "max_ram": limit}, 2, 220, spill=own)
    return report["calibration"]["spilled_to_disk"], folders


def test_every_rank_spills_to_a_disk_of_its_own(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    run_ranks(1, run, source, tmp_path / "one", FIELDS, 2, 220)
    for rank in range(2):
        (tmp_path / f"disk{rank}").mkdir()
    checkpoint = open_checkpoint(source)
    least = least_bytes(checkpoint, Needs(twin=True))
    found = run_ranks(2, spilling, source, tmp_path / "out", tmp_path, f"{least}B")
    for rank, (spilled, folders) in enumerate(found):
        assert spilled and folders
        assert all(str(tmp_path / f"disk{rank}") in folder for folder in folders)
        assert not list((tmp_path / f"disk{rank}").iterdir())  # gone with the run
    assert weights(tmp_path / "out") == weights(tmp_path / "one")


def refused(source: Path, out: Path) -> None:
    run(source, out, FIELDS, None, spill=out.parent / "nowhere")


def test_a_spill_folder_that_is_not_there(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    for kind, said in sentences(2, refused, source, tmp_path / "out"):
        assert kind == "UsageError" and "nowhere is no folder" in said


def shares(source: Path, out: Path) -> list[int]:
    """Bytes of the checkpoint that this rank has read in layers and embedding."""
    run(source, out, FIELDS, None)
    return [team().read, team().sent]


def test_no_rank_reads_every_byte(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    whole = sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    found = run_ranks(3, shares, source, tmp_path / "out")
    assert sum(read for read, _ in found) == whole
    assert max(read for read, _ in found) < 0.6 * whole
    told = json.loads((tmp_path / "out" / "results.json").read_text())["ranks"]
    assert [each["read"] for each in told] == [read for read, _ in found]
    assert [each["windows"] for each in told] == [8, 8, 9]
