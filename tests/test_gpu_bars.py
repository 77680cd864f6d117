"""What bench/gpu.py leaves behind: table, file, bars, README. All figures here are invented."""

import json
import sys
from pathlib import Path

import pytest

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import gpu, gpu_bars, gpu_report

ROOT = Path(gpu.__file__).resolve().parent.parent
DAY = {"date": "2031-05-06T07:08:09+00:00"}


def row(kind, tokens, ours, torch=1.0, rows=28672, cols=4096):
    def times(seconds):
        return {"median": seconds, "least": seconds, "most": seconds, "runs": 3}

    return {
        "name": f"{rows}x{cols} {kind}, {tokens}",
        "ours": times(ours),
        "rulers": {"torch bf16": times(torch)},
        "work": {"copy": 1.0},
        "difference": 0.0,
        "limit": 1e-2,
        "of": {"op": "linear", "kind": kind, "rows": rows, "cols": cols, "tokens": tokens},
    }


def report(rows=(), model=(), smoke=False):
    facts = DAY | {"device": "NVIDIA H100", "smoke": smoke, "capability": "9.0", "archs": ["90a"]}
    sections = [
        gpu_report.Section("tests", said="319 passed"),
        gpu_report.Section("sanitize", "failed", "memcheck clean; racecheck found: Error"),
        gpu_report.Section("sqgemm", rows=list(rows)),
        gpu_report.Section("whole", rows=list(model)),
    ]
    ceilings = {"copy": 2.0, "bf16": 1.0, "fp32": 1.0}
    return gpu_report.Report(facts, ceilings, sections)


def line(name, of):
    (found,) = [text for text in gpu_bars.table(of).splitlines() if text.startswith(f"| {name}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def sample_report():
    facts = {"device": "NVIDIA H100 80GB HBM3", "date": "2031-05-06T07:08:09+00:00"}
    one = row("int4", 1, 0.5) | {"work": {"fp32": 1e-3, "copy": 1e-6}}
    rows = [one, {"name": "lost", "error": "RuntimeError: no"}]
    ceilings = {"copy": 3000.0, "bf16": 8e5, "fp32": 0.01}
    return gpu_report.Report(facts, ceilings, [gpu_report.Section("mask", rows=rows)])


def test_the_table_is_markdown():
    lines = gpu_report.table(sample_report()).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {9}
    assert [c.strip() for c in lines[0].strip("|").split("|")] == list(gpu_report.HEADINGS)
    assert "| 500 ms " in lines[2] and "2e-06 TFLOP/s" in lines[2] and "20.0%" in lines[2]
    assert "100 ms (fp32)" in lines[2]
    assert "RuntimeError: no" in lines[3]
    unknown = sample_report()
    unknown.ceilings = {}
    assert "0.002 GFLOP/s" not in gpu_report.table(unknown)
    assert "FAILED mask: lost: RuntimeError: no" in gpu_report.closing(unknown)
    assert "more, all in the file" not in gpu_report.closing(unknown)
    unknown.sections[0].rows *= gpu_report.SHOWN + 2
    closing = gpu_report.closing(unknown).splitlines()
    assert sum(line.startswith("FAILED mask") for line in closing) == gpu_report.SHOWN
    assert closing[-1] == "FAILED and 2 more, all in the file"


def test_the_file_is_complete_and_never_overwritten(tmp_path):
    report = sample_report()
    path = gpu_report.results_file(report.facts, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3-2031-05-06.json"
    report.save(path)
    assert gpu_report.results_file(report.facts, tmp_path).name.endswith("-05-06-2.json")
    again = gpu_report.Report.load(path)
    assert gpu_report.table(again) == gpu_report.table(report) and again.facts == report.facts
    body = json.loads(path.read_text())
    assert body["failures"] == ["mask: lost: RuntimeError: no"]
    assert body["sections"][0]["rows"][0]["ours"]["median"] == 0.5


def test_circumstances_are_known_or_none():
    found = gpu_report.circumstances()
    assert set(found) == {"date", "commit", "changed_since_commit", "driver"}
    assert gpu_report._first_line("no-such-program-anywhere") is None


# ---- bars ----


def test_the_worst_case_decides():
    rows = [row("int4", 1, 0.25), row("int4", 16, 0.4, cols=14336), row("int4", 64, 0.01)]
    rows += [{"name": "lost", "error": "RuntimeError: no"}]
    assert line("int4, 1 to 16", report(rows))[1:] == [
        ">= 2.60x",
        "3.30x",
        "2.50x",
        "28672x14336 int4, 16",
        "not met",
    ]
    assert line("int4, 1 to 16", report(rows[:1]))[-1] == "goal reached"
    assert line("int4, 1 to 16", report([row("int4", 8, 0.36)]))[-1] == "met"
    assert line("int4, 64", report(rows))[3] == "100.00x"


def test_sparse_is_compared_with_dense_of_the_same_case():
    rows = [row("int4", 64, 0.5), row("int4-2:4", 64, 0.25), row("int4", 8, 0.1)]
    rows += [row("int4-2:4", 8, 0.1, rows=6144), row("int4-2:4", 128, 0.9), row("int4", 128, 0.1)]
    assert line("2:4 int4 over our int4", report(rows))[3:] == [
        "2.00x",
        "28672x4096 int4-2:4, 64",
        "met",
    ]
    assert line("2:4 int4, 128", report(rows))[3] == "1.11x"


def test_only_the_head_counts_for_int8():
    assert line("int8 head", report([row("int8", 1, 0.1)]))[3] == "not yet measured"
    assert line("int8 head", report([row("int8", 1, 0.5, rows=256000)]))[3] == "2.00x"


def test_the_whole_model_must_stay_under_its_bars():
    part = {"name": "one layer, textbook", "seconds": 9.0}
    all_of_it = {"name": "ours", "quality": "plain", "seconds": 61.0, "whole": True}
    slower = all_of_it | {"quality": "default", "seconds": 7.0, "peak_vram": 1e9}
    all_of_it |= {"peak_vram": 12e9, "layer_median_seconds": 0.25, "work": {"bf16": 6.1}}
    of = report(model=[part, slower, all_of_it])
    assert line("whole model", of)[1:] == ["<= 60 s", "30 s", "61 s", "ours", "not met"]
    assert line("peak of GPU", of)[3:] == ["12 GB", "ours", "met"]
    for no_bar in (part, slower):
        assert line("whole model", report(model=[no_bar]))[3] == "not yet measured"
    table = gpu_report.table(of)
    assert "| 9 s" in table
    assert "peak vram 12 GB, layer median 250 ms" in table and "6.1 s (bf16) | 10.0%" in table


def test_tests_and_sanitizers_stand_in_the_table():
    assert line("`pytest -m cuda`", report())[-2:] == ["319 passed", "met"]
    assert line("compute-sanitizer", report())[-1] == "not met"
    nothing = gpu_report.Report(DAY)
    assert line("compute-sanitizer", nothing)[-2:] == ["not yet measured", "-"]


def test_readme_is_written_from_a_file(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- bench:gpu -->\nold\n<!-- /bench:gpu -->\nb\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    path = tmp_path / "run.json"
    report([row("int4", 1, 0.25)]).save(path)
    assert gpu.main(["--from", str(path), "--readme"]) == 1  # the sanitizer found something
    text = readme.read_text()
    assert "old" not in text and text.startswith("a\n") and text.endswith("-->\nb\n")
    assert "NVIDIA H100, 2031-05-06" in text and "28672x4096 int4, 1" in text
    assert "FAILED sanitize: memcheck clean; racecheck found" in capsys.readouterr().out
    with pytest.raises(ValueError, match="come from a GPU"):
        gpu_bars.write_readme(report(smoke=True), readme)


def test_readme_has_figures_exactly_where_a_gpu_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- bench:gpu -->")[1].split("<!-- /bench:gpu -->")[0]
    files = [json.loads(p.read_text()) for p in sorted(gpu_report.RESULTS.glob("*.json"))]
    facts = [f["facts"] for f in files if isinstance(f, dict) and "facts" in f]
    devices = {known["device"] for known in facts if known.get("capability")}
    assert any(device in shown for device in devices) == bool(devices)
    assert ("not yet measured" in shown and "| ---" not in shown) == (not devices)
