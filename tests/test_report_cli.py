"""`distaya report`, and --report of the commands that measure."""

import json

import pytest
from report_case import Page, fill
from speaking import SENTENCES, save_model, save_texts
from typer.testing import CliRunner

from distaya_ext.checkpoint import MARKER
from distaya_ext.cli import report as report_module
from distaya_ext.cli.app import app


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_report_renders_a_folder_again(tmp_path):
    folder = fill(tmp_path / "out")
    result = distaya("report", folder)
    assert result.exit_code == 0, result.stderr
    assert str(folder / "report.html") in result.stdout.replace("\n", "")
    assert "Swahili lost most" in (folder / "README.md").read_text(encoding="utf-8")
    first = (folder / "report.html").read_bytes()
    (folder / "report.html").write_text("old")
    told = json.loads(distaya("report", folder, "--json").stdout)
    assert told == {"report": str(folder / "report.html"), "bytes": len(first)}
    assert (folder / "report.html").read_bytes() == first


def test_report_writes_elsewhere(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(report_module.typer, "launch", opened.append)
    folder, page = fill(tmp_path / "out"), tmp_path / "page.html"
    result = distaya("report", folder, "--out", page, "--open")
    assert result.exit_code == 0, result.stderr
    assert Page(page.read_text(encoding="utf-8")).problems == []
    assert not (folder / "report.html").exists() and not (folder / "README.md").exists()
    assert opened == [page.as_uri()]


@pytest.mark.parametrize(
    ("break_it", "code", "words"),
    [
        (lambda f: f.rename(f.with_name("gone")), 3, "is no folder"),
        (lambda f: (f / "recipe.yaml").write_text("model: x"), 3, "not written by distaya"),
        (lambda f: (f / "results.json").write_text("{"), 3, "results.json of out is not valid"),
        (lambda f: [p.unlink() for p in f.glob("*.*") if p.name != "recipe.yaml"], 3, "no results"),
    ],
)
def test_report_refuses_in_a_sentence(tmp_path, break_it, code, words):
    folder = fill(tmp_path / "out")
    break_it(folder)
    result = distaya("report", folder)
    assert result.exit_code == code and words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_report_needs_a_place(tmp_path):
    folder = fill(tmp_path / "out")
    for out in (tmp_path, tmp_path / "no" / "page.html"):
        result = distaya("report", folder, "--out", out)
        assert result.exit_code == 2 and "--out" in result.stderr


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A small model and what compression made of it, texts of two languages."""
    place = tmp_path_factory.mktemp("report")
    save_model(place / "model", seed=3)
    save_texts(place / "texts", repeat=8)
    result = distaya(
        "compress", place / "model", "--out", place / "small", "--sparsity", "2:4",
        "--calib", place / "texts", "--window", "16", "--tokens", "512", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return place


def test_compress_leaves_a_page_that_says_what_is_not_known(compressed):
    page = Page((compressed / "small" / "report.html").read_text(encoding="utf-8"))
    assert page.problems == []
    assert "distaya eval . --against MODEL --texts TEXTS --report" in page.text
    assert "Not measured How fast it runs" in page.text
    assert str(compressed) not in page.text


def test_eval_and_bench_fill_the_page(compressed, tmp_path, monkeypatch):
    """Each adds its part; a second run tells what changed since the first."""
    monkeypatch.setenv("DISTAYA_HISTORY", str(tmp_path / "history.jsonl"))
    small, model = compressed / "small", compressed / "model"
    asked = ("--texts", compressed / "texts", "--window", "16", "--tokens", "256", "--quiet")
    for again in range(2):
        result = distaya(
            "eval", small, "--against", model, *asked, "--report", "--gate", "max_gap=50"
        )
        assert result.exit_code == 0, result.stderr
        assert "report.html" in result.stderr
        page = Page((small / "report.html").read_text(encoding="utf-8"))
        assert "Gate passed max_gap at most 50" in page.text
        assert ("Against earlier runs" in page.text) == bool(again)
    assert "No figure moved beyond its noise." in page.text
    assert len(page.all("article")) >= len(SENTENCES)
    run = ("--prompt", "8", "--new", "4", "--runs", "1", "--quiet")
    result = distaya("bench", "model", small, "--against", model, *run, "--report", "--json")
    assert result.exit_code == 0, result.stderr
    stored = json.loads((small / "speed.json").read_text())
    assert stored["rows"][0]["decode_rate"] == json.loads(result.stdout)["rows"][0]["decode_rate"]
    assert [row["name"] for row in stored["rows"]] == ["small", "model"]
    text = (small / "report.html").read_text(encoding="utf-8")
    assert "no gain here" in text and "lost most" in text
    kept = "".join(p.read_text() for p in small.glob("*.json") if "token" not in p.name)
    assert str(compressed) not in kept + text


def test_a_failed_gate_is_on_the_page(compressed):
    small = compressed / "small"
    result = distaya(
        "eval", small, "--against", compressed / "model", "--texts", compressed / "texts",
        "--window", "16", "--tokens", "256", "--quiet", "--report", "--continuations", "0",
        "--gate", "max_worst_ppl_ratio=0.001",
    )  # fmt: skip
    assert result.exit_code == 6
    text = (small / "report.html").read_text(encoding="utf-8")
    assert "Gate failed" in text and "0.001 allowed" in text


@pytest.mark.parametrize("command", [["eval", "--texts"], ["bench", "model"]])
def test_report_flags_refuse_foreign_folders_before_any_work(tmp_path, command):
    model = save_model(tmp_path / "model", seed=3)
    arguments = [*command, tmp_path] if command[0] == "eval" else command
    result = distaya(*arguments, model or tmp_path / "model", "--report")
    assert result.exit_code == 2 and "--report writes into the folder" in result.stderr
    assert MARKER not in result.stderr
