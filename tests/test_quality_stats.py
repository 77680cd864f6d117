"""Figures of the quality bench on made-up records: pooling, intervals, ratios, rounds of time."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import quality, quality_ours, quality_rows, quality_stats, quality_store, quality_timing


def made_up(deltas: dict[str, dict[int | None, dict[str, list[float]]]]) -> quality_store.Store:
    store = quality_store.Store({}, {})
    for key, by_seed in deltas.items():
        for seed, windows in by_seed.items():
            record = {"row": key, "seed": seed, "code": "", "seconds": 1.0, "bits": 3.0, "kl": 0.1}
            record |= {"kl_p99": 1.0, "agreement": 0.5, "windows": windows}
            record["delta"] = float(np.mean([np.mean(v) for v in windows.values()]))
            store.put(record)
    return store


def test_seeds_are_pooled_and_ratios_are_paired():
    rng = np.random.default_rng(0)
    base = {s: {"en": rng.random(9) + 1, "fr": rng.random(4) + 3} for s in (0, 1)}
    half = {s: {lang: v / 2 for lang, v in each.items()} for s, each in base.items()}
    half[2] = {lang: np.full(len(v), 99.0) for lang, v in base[0].items()}  # no partner
    store = made_up({"2:4 | sparsegpt": base, "2:4 | ours-plain": half})
    found = {f.row.id: f for f in quality_stats.figures(store, quality_stats.rows_in(store))}
    assert found["ours-plain"].ratio == pytest.approx(0.5)
    assert found["ours-plain"].ratio_interval == pytest.approx((0.5, 0.5))
    ruler = found["sparsegpt"]
    assert ruler.worst_language == "fr" and ruler.seeds == 2
    assert ruler.delta == pytest.approx(
        np.mean([np.mean([base[0][lang], base[1][lang]]) for lang in ("en", "fr")])
    )


def test_the_interval_narrows_as_it_should():
    """Of 400 windows of one language: 1.96 standard errors to either side."""
    values = np.random.default_rng(1).normal(5, 1, 400)
    store = made_up({"int3 | gptq": {0: {"en": values}}})
    (found,) = quality_stats.figures(store, quality_stats.rows_in(store))
    low, high = found.delta_interval
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_rounds_take_turns(tmp_path, monkeypatch):
    order: list[str] = []
    spent = {"ours-plain": 2.0, "ours-default": 3.0, "ours-high": 8.0}

    def clocked(row, drawn, options, out):
        order.append(row.id)
        return spent[row.id] + 0.1 * len(order), None

    monkeypatch.setattr(quality_ours, "compress_once", clocked)
    args = quality.arguments(["--timing", "3"])
    store = quality_store.Store({}, {}, path=tmp_path / "t.json")
    chosen = quality_rows.select(list(spent), ["2:4"])
    quality_timing.add(store, chosen, None, None, args, print)
    names = list(spent)
    assert order == [*names, *reversed(names), *names]
    kept = quality_store.read(tmp_path / "t.json").timing
    assert kept["rounds"] == 3 and len(kept["rows"]["2:4 | ours-high"]) == 3
    row = next(r for r in chosen if r.id == "ours-high")
    record = {"windows": {"en": [1.0, 2.0]}, "seconds": 99.0, "delta": 1.5, "bits": 16.0}
    record |= {"row": row.key, "seed": 0, "code": "", "kl": 0.0, "kl_p99": 0.0, "agreement": 1.0}
    store.put(record)
    (found,) = quality_stats.figures(store, [row])
    assert found.timed and found.seconds == pytest.approx(8.4)
    assert found.slower == pytest.approx(8.4 / 2.6)
