"""bench/sqgemm_table.py without its long run: what it plans, its bars, what it writes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import sqgemm_table
from distaya_ext.measure import kernels, limits, shapes
from distaya_ext.measure.layer import LayerRow
from distaya_ext.ops import pack

LIMIT = limits.Limits(threads=2, read=40.0, int8=2000.0, bf16=1000.0, fp32=500.0)


def row(name, tokens, ms, shape="aya-8b down", contended=False, **rulers):
    """A row of 4096x14336 as measured; rulers: name -> ms."""
    kind = None if name.startswith("torch") else name
    nbytes = 30_000_000 if kind is None else pack.Format(kind, 4096, 14336).expected_bytes()
    made = kernels.Row(
        shape=shape, rows=4096, cols=14336, tokens=tokens, threads=2, name=name, kind=kind,
        mode=None, work="int8" if kind else "bf16", nbytes=nbytes, seconds=ms / 1e3,
        gbs=nbytes / ms / 1e6, gops=2e-9 * tokens * 4096 * 14336 / (ms / 1e3), least=0.0,
        bound="", reached=0.0, read=40.0 if tokens <= 8 else None,
        ratios={f"torch {ruler}": other / ms for ruler, other in rulers.items()},
        error=None, runs=5, contended=contended,
    )  # fmt: skip
    (held,) = kernels.limited([made], [LIMIT])
    return held


def rows(ms=0.8, sparse=0.8):
    found = [row("torch int4", 1, 1.6), row("int4", 1, ms, int4=1.6, bf16=6.0)]
    found += [row("int4-2:4", 1, sparse, int4=1.6), row("int4-mask", 1, sparse, int4=1.6)]
    for tokens, ours, int4, bf16 in ((16, 1.0, 3.5, 5.0), (128, 8.0, 40.0, 13.0)):
        found += [row("torch int4", tokens, int4), row("torch bf16", tokens, bf16)]
        found.append(row("int4", tokens, ours, int4=int4, bf16=bf16))
    return found


def decode(times):
    return LayerRow("aya-8b", "int4", 2, 1 << 27, 4e-3, 250.0, 33.0, times, False)


def test_bars_are_those_of_the_issue():
    bars = sqgemm_table.bars(rows(), [decode(4.0)])
    got = {bar.text: (round(bar.got, 2), bar.wanted, bar.met) for bar in bars}
    assert got == {
        "aya-8b down, 1 token, int4 times torch int4": (2.0, 1.5, True),
        "aya-8b down, 16 tokens, int4 times torch int4": (3.5, 3.0, True),
        "aya-8b down, 128 tokens, int4 times torch int4": (5.0, 4.0, True),
        "aya-8b down, 128 tokens, int4 times torch bf16": (1.62, 1.5, True),
        "aya-8b down, 1 token, int4, share of the read bandwidth measured in turns with it": (
            0.95,
            0.8,
            True,
        ),
        "aya-8b down, 1 token, int4-2:4 times int4": (1.0, 0.95, True),
        "aya-8b down, predicted over true bytes of int4-2:4": (1.0, 0.99, True),
        "aya-8b down, 1 token, int4-mask times int4": (1.0, 0.95, True),
        "aya-8b down, predicted over true bytes of int4-mask": (1.0, 0.99, True),
        "aya-8b layer, decode, int4 times dense bf16": (4.0, 3.0, True),
    }


def test_a_bar_that_is_missed_says_what_the_machine_allows():
    bars = sqgemm_table.bars(rows(ms=1.2, sparse=1.3), [decode(2.0)])
    missed = {bar.text: str(bar) for bar in bars if not bar.met}
    assert list(missed) == [
        "aya-8b down, 1 token, int4 times torch int4",
        "aya-8b down, 1 token, int4, share of the read bandwidth measured in turns with it",
        "aya-8b down, 1 token, int4-2:4 times int4",
        "aya-8b down, 1 token, int4-mask times int4",
        "aya-8b layer, decode, int4 times dense bf16",
    ]
    first = next(iter(missed.values()))
    assert "1.33, wanted 1.5, NOT MET: ours reads 25.2 of 40.0 GB/s (63 %), the ruler" in first
    assert "at the speed of that plain read ours would be 2.11 times the ruler" in first


def test_the_plan_covers_the_bars_and_the_models():
    plans = sqgemm_table.plans([1, 2], smoke=False)
    assert all(list(plan.threads) == [1, 2] for plan in plans)
    cells = {(s.name, t, k) for p in plans for s in p.shapes for t in p.tokens for k in p.kinds}
    for shape in ("aya-8b gate/up", "aya-8b down"):
        for kind in pack.KINDS:
            assert {(shape, t, kind) for t in (1, 2, 4, 8, 16, 32, 64, 128)} <= cells
        assert {(shape, t, "int4") for t in shapes.TOKENS} <= cells
    assert set(shapes.MODELS) == {name.split()[0] for name, _, _ in cells}
    assert ("aya-8b head", 1, "int8") in cells


def test_smoke_run_writes_json_and_no_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_SAMPLE", 1e-4)
    monkeypatch.setattr(kernels, "_RUNS", 2)
    monkeypatch.setattr(kernels, "_AGAIN", 0)
    monkeypatch.setattr(limits.Machine, "at", lambda self, threads: replace(LIMIT, threads=1))
    monkeypatch.setattr(limits.Machine, "peaks", lambda self: None)
    monkeypatch.setattr(sqgemm_table.harness, "write_table", None)
    path = tmp_path / "out.json"
    flags = ["x", "--smoke", "--readme", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", flags)
    sqgemm_table.main()
    text = capsys.readouterr().out
    assert "| 256x512 | 128 |" in text and "| 1 | dense bf16 | 1 |" in text
    body = json.loads(path.read_text())
    assert {"limits", "layers", "bars", "rows", "machine", "wait_policy"} <= set(body)
    assert body["bars"] == [], "the bars are those of the large matrices at 2 threads"


def test_readme_is_left_alone_when_rows_are_contended(monkeypatch):
    spoilt = kernels.Result(limits=[LIMIT], rows=[row("int4", 1, 0.8, contended=True)])
    with pytest.raises(SystemExit, match="left alone, contended rows: aya-8b down 1 int4"):
        sqgemm_table.write_readme(spoilt, [])
    written = []
    monkeypatch.setattr(sqgemm_table.harness, "write_table", lambda *a: written.append(a))
    sqgemm_table.write_readme(kernels.Result(limits=[LIMIT], rows=rows()), [decode(4.0)])
    ((path, name, text),) = written
    assert path.name == "README.md" and name == "sqgemm"
    assert "| aya-8b down | 16 | 5.00 | 3.50 | 1.00 |" in text
    assert "| 2 | int4 | 128 | 250 | 4.00 |" in text
