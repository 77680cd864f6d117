"""compress() by several processes: the same bits as by one that sums in as many parts."""

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranked import run_ranks

from distaya_ext.compress import compress, ferry
from distaya_ext.compress.ferry import Ferry

RECIPES: dict[str, dict[str, Any]] = {
    "plain 2:4": {"nm": "2:4", "quality": "plain"},
    "2:4": {"nm": "2:4"},
    "half": {"sparsity": 0.5},
    "int4": {"method": "gptq", "bits": 4, "group": 32, "embed_bits": 8},
    "2:4+int4, high": {"nm": "2:4", "bits": 4, "group": 32, "quality": "high"},
    "half, high": {"sparsity": 0.5, "quality": "high"},
    "int3, activation": {"method": "gptq", "bits": 3, "group": 32, "order": "activation"},
    "2:4, group": {"nm": "2:4", "order": "group"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "ria": {"method": "ria", "nm": "2:4"},
    "dass": {"method": "dass", "nm": "2:4"},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "worst": {"nm": "2:4", "calibration": {"weights": "worst"}},
    "permute": {"nm": "2:4", "permute": True},
}


def weights(folder: Path) -> str:
    """A hash of all weight files."""
    made = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        made.update(path.read_bytes())
    return made.hexdigest()


def run(
    source: Path,
    out: Path,
    fields: dict[str, Any],
    parts: int | None,
    windows: int = 25,
    **more: Any,
) -> dict[str, Any]:
    fields = dict(fields)
    calibration = {"tokens": 1 << 20, **fields.pop("calibration", {}), "parts": parts}
    recipe = tiny.recipe(fields.pop("method", "sparsegpt"), calibration=calibration, **fields)
    report = compress(source, out, recipe, tiny.windows(windows), **more)
    return report.summary()


def many(source: Path, out: Path, cases: dict[str, dict[str, Any]], parts: int | None) -> list:
    return [run(source, out / name, fields, parts) for name, fields in cases.items()]


FEW = ("half", "2:4+int4, high", "dass")  # of every family, and dealt out unevenly


def late(*args: Any) -> list:
    """many() as on a GPU, whose results are looked at late."""
    ferry.runs_late = lambda device: True
    return many(*args)


def compared(
    source: Path, folder: Path, names: Iterable[str], world: int, parts: int, work: Any = many
) -> None:
    """So many ranks at `work`, in so many parts, beside one process in as many."""
    cases = {name: RECIPES[name] for name in names}
    run_ranks(1, many, source, folder / "one", cases, parts)
    told = run_ranks(world, work, source, folder / "more", cases, None if world == parts else parts)
    for name in cases:
        assert weights(folder / "more" / name) == weights(folder / "one" / name), name
    assert all(found == told[0] for found in told)


def test_two_ranks_write_what_one_process_writes(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    compared(source, tmp_path, RECIPES, 2, 2)


@pytest.mark.parametrize("family", ["cohere2", "llama-bias"])
def test_three_ranks_write_what_one_process_writes(family: str, tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES[family])
    compared(source, tmp_path, FEW, 3, 3)


@pytest.mark.parametrize("work", [many, late])
def test_a_rank_without_rows(work: Any, tmp_path: Path) -> None:
    """o_proj and down_proj have 64 rows, which are four times 16."""
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    compared(source, tmp_path, FEW, 5, 5, work)


def test_ranks_whose_results_are_looked_at_late(tmp_path: Path) -> None:
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere2"])
    compared(source, tmp_path, RECIPES, 2, 2, late)


@pytest.mark.parametrize(("world", "parts"), [(2, 5), (3, 2)])
def test_parts_that_ranks_do_not_share_evenly(world: int, parts: int, tmp_path: Path) -> None:
    """More parts than ranks, and a rank that has none."""
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    compared(source, tmp_path, FEW, world, parts)


def test_parts_change_last_bits(tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    source = tiny.make(tmp_path / "model", tiny.FAMILIES["cohere"])
    case = {"2:4+int4": {"nm": "2:4", "bits": 4, "group": 32, "format": "dense"}}
    for parts in (1, 2):
        run_ranks(1, many, source, tmp_path / str(parts), case, parts)
    assert len({weights(tmp_path / str(parts) / "2:4+int4") for parts in (1, 2)}) == 2


def test_what_is_written_behind_goes_by_another_thread_in_order() -> None:
    """Rank 0's way of writing: the main thread is at the next layer while a job is at work."""
    started, told = threading.Event(), []

    def job(number: int) -> tuple[int, int]:
        started.wait(10)
        return number, threading.get_ident()

    with Ferry(torch.device("cpu"), behind=True) as way:
        assert not way.late
        for number in range(3):
            way.do(lambda n=number: job(n), told.append)
        way.turn()  # of the layer before, of which there is nothing
        assert not told
        started.set()
        way.land()
    assert [number for number, _ in told] == [0, 1, 2]
    assert {thread for _, thread in told}.isdisjoint({threading.get_ident()})
