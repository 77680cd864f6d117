"""bench/scaling.py without its clock: what it makes of measurements, and its arithmetic."""

import json
import sys
from pathlib import Path

import pytest

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import arithmetic, scaling, scaling_report
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress.phases import layer_bytes


def _row(name: str, wall: float, weights: str = "a") -> dict:
    ranks = [
        {"windows": 23, "read": 3 << 20, "sent": (2 + rank) << 20, "waited": 1.5 - rank}
        for rank in range(2 * (name == "two ranks"))
    ]
    run = {"name": name, "wall": wall, "run": wall - 4, "cpu": wall, "weights": weights}
    run["peak"] = (6 if ranks else 7) << 30
    return {**run, "tokens": 11776, "ranks": ranks}


def _measured(weights: str = "b") -> dict:
    seconds = {"one process": (44, 40, 90), "two ranks": (24, 30, 25)}
    rows = [_row(name, t, "b" if "two" in name else "a") for name in seconds for t in seconds[name]]
    plan = {
        "rows": [
            {
                "ranks": n, "parts": {"gather": 30.0 / n, "rows": 5.0, "train": 0.0},
                "seconds": 40 / n + 2, "layer": 36 / n + 4, "efficiency": 0.9, "sent": 4 << 20,
                "read": 3 << 20,
            }
            for n in (1, 2)
        ],
        "wire": {"bytes_per_second": 5e8, "source": "measured between two processes of this host"},
        "sentence": "simulated: 2 ranks take long",
    }  # fmt: skip
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "A processor", "cores": 2},
        "model": {"name": "aya-8b", "layers": 1},
        "recipe": {"quality": "plain"},
        "tokens": 11776,
        "window": 256,
        "rows": rows,
        "parts": _row("one process, two parts", 45, weights),
        "both": [_row("two runs at once that share nothing", 55)],
        "plan": plan,
    }


def test_what_follows_from_the_measurements():
    found = scaling_report.judged(_measured())
    assert found["medians"]["wall"]["one process"] == 44
    assert found["efficiency"] == {"wall": 44 / 50, "run": 40 / 42}
    assert found["ceiling"] == {"wall": 44 / 55, "run": 40 / 51}
    assert found["same_bits"] and not scaling_report.judged(_measured("other"))["same_bits"]
    text = scaling_report.text(found)
    assert "| two ranks | 25.0 s | 21.0 s |" in text
    assert "| efficiency of two ranks, T1 / (2 T2) | 0.88 | 0.95 |" in text
    assert "expected | 0.90 | 0.91 (of the layers) |" in text
    assert "the same bits" in text and "sent 3.0 MiB (4.0 expected)" in text
    assert "It held at most 6144 MiB, one process 7168 MiB." in text
    assert "waited 1.5 s" in text and "A processor, 2026-01-02; medians of 3" in text
    assert "NOT the same bits" in scaling_report.text(scaling_report.judged(_measured("other")))
    parts = scaling_report.parts(found)
    assert "| 2 | 15.00 | 5.00 | 22.0 s | 25.0 s |" in parts and "train" not in parts


def test_kept_figures_are_shown_again_and_written(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "scaling.json"
    kept.write_text(json.dumps(scaling_report.judged(_measured())))
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "docs" / "scaling.md"):
        path.write_text("before\n<!-- bench:scaling -->\n<!-- /bench:scaling -->\nafter\n")
    scaling.main(["--from", str(kept), "--readme", "--docs"])
    shown = capsys.readouterr().out
    for path in (tmp_path / "README.md", tmp_path / "docs" / "scaling.md"):
        assert shown.strip() in path.read_text()
    assert "simulated: 2 ranks take long" in (tmp_path / "docs" / "scaling.md").read_text()
    kept.write_text(json.dumps(scaling_report.judged(_measured("other"))))
    with pytest.raises(SystemExit, match="other weights"):
        scaling.main(["--from", str(kept)])


def test_shapes_are_those_of_a_checkpoint_on_disk(tmp_path):
    from bench.whole_model import make

    make(tmp_path, scaling.sizes_of("tiny"), 1)
    real, made = open_checkpoint(tmp_path), arithmetic.shapes((256, 512, 1, 8, 2, 8192))
    assert {n: (e.shape, e.dtype) for n, e in real.entries.items()} == {
        n: (e.shape, e.dtype) for n, e in made.entries.items()
    }
    assert real.tied and made.tied and layer_bytes(real) == layer_bytes(made)


def test_arithmetic_counts_operations_as_it_says(monkeypatch):
    fp32, bf16 = (arithmetic.PEAK[k] * arithmetic.ASSUMED[k] for k in ("fp32", "bf16"))
    job = arithmetic.job_of(
        arithmetic.shapes((256, 512, 1, 8, 2, 8192)),
        {"method": "sparsegpt", "nm": "2:4", "quality": "plain"},
    )
    work = arithmetic.work_of(job, 0)
    stages = [(256 + 128 + 1024, 256), (256, 256), (256, 512)]  # rows and columns
    weights = sum(rows * columns for rows, columns in stages)
    triangles = sum(columns**2 for _, columns in stages)
    attention = 2 * arithmetic.LENGTH * 256
    assert work.token == pytest.approx((2 * weights + attention + triangles) / bf16)
    assert work.rows == pytest.approx(sum(2 * r * c**2 for r, c in stages) / fp32)
    cubes = sum(c**3 for _, c in stages)
    rate = arithmetic.PEAK["fp32"] * arithmetic.ASSUMED["factor"]
    assert work.factor == pytest.approx(cubes / 3 / rate)
    assert work.train == 0 and work.read == pytest.approx(2 * (weights + 256) / 5e9)


def test_arithmetic_is_shown_as_such(monkeypatch):
    monkeypatch.setattr(arithmetic, "MODELS", {"small": (256, 512, 2, 8, 2, 8192)})
    monkeypatch.setattr(arithmetic, "WINDOWS", 8)
    found = list(arithmetic.rows())
    for row in found:
        assert [each.ranks for each in row.found.rows] == [1, 2, 4, 8] and row.depth == 2
        assert row.found.rows[0].efficiency == 1 and not any(row.away.values())
    high = found[1].found.rows
    assert high[0].parts["train"] > 0 == high[0].parts["gradients"] < high[1].parts["gradients"]
    text = arithmetic.text(iter(found))
    assert text.startswith("Simulated, not measured") and "989 TFLOP/s dense bf16" in text
    assert text.count("| default, 2:4 + int4 |") == text.count("| high, 2:4 |") == 4


def test_the_recipe_is_one_that_compress_takes():
    from distaya_ext import Recipe

    parsed = scaling.argparse.Namespace(tokens=5888, window=128, quality="plain")
    assert Recipe(model="m", **scaling.recipe(parsed, scaling.TEXTS, 2)).calibration.parts == 2
    assert scaling.sizes_of("aya-8b").ff == 14336 and scaling.sizes_of("aya-8b").vocab == 8192
