"""bench/quality.py on a tiny model: every kind of row, intervals, resuming, what is missing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quality_case
import torch
from quality_case import PATTERNS, SEEDS
from transformers import AutoModelForCausalLM

from distaya_ext import Recipe

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import (
    plain,
    quality,
    quality_ours,
    quality_picture,
    quality_rows,
    quality_score,
    quality_stats,
    quality_store,
    quality_texts,
)

ROWS = (
    "magnitude", "wanda", "ria", "rtn", "sparsegpt", "gptq", "dass", "sparsegpt-mlp", "ours-plain",
    "ours-search",
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return quality_case.arguments(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def done(words, tmp_path_factory) -> Path:
    """The JSON of one run in a build that has no search."""
    out = tmp_path_factory.mktemp("results") / "quality.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "distaya_ext.search", None)
        assert quality.main([*words, "--rows", *ROWS, "--json", str(out)]) == 0
    return out


# ---- rows ----


def test_every_row_is_there_once_a_seed_or_told_as_missing(done):
    store = quality_store.read(done)
    chosen = quality_rows.select(list(ROWS), list(PATTERNS))
    assert {row.side for row in chosen} == {"textbook", "ours"}
    for row in chosen:
        seeds = set(store.seeds(row.key))
        if row.kind == "search":
            assert "search" in store.missing[row.key] and not seeds
        else:
            assert seeds == (set(SEEDS) if row.seeded else {None}), row.key
    assert set(store.records) == {(k, s) for k, s in store.records if k not in store.missing}


def test_a_row_says_what_another_yardstick_says(done, words):
    """SparseGPT at 2:4, seed 1, compressed and scored apart from the bench's own scoring."""
    args = quality.arguments(words)
    tokenizer = quality.Run(args, print).tokenizer
    windows = plain.drawn(plain.read_folder(args.calibration), tokenizer, 8, 32, 1)
    test = quality_texts.test_windows(args.test, tokenizer, 32, 3)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    _, before = plain.evaluate(model, test)
    plain.textbook_compress(model, windows.ids, plain.Method("", "sparsegpt", nm=(2, 4)))
    _, after = plain.evaluate(model, test)
    record = quality_store.read(done).records["2:4 | sparsegpt", 1]
    for lang, one in record["languages"].items():
        assert one["nll"] == pytest.approx(after[lang], abs=2e-5)
        assert one["delta"] == pytest.approx(after[lang] - before[lang], abs=2e-5)
        assert one["delta"] == pytest.approx(np.mean(record["windows"][lang]), abs=2e-5)
    assert record["delta"] == pytest.approx(
        np.mean([after[lang] - before[lang] for lang in test]), abs=2e-5
    )


def test_the_base_differs_from_itself_by_nothing(words):
    args = quality.arguments(words)
    run = quality.Run(args, print)
    found = quality_score.score(run.dense(), run.base)
    assert found.kl_p99 == 0.0
    for one in found.languages.values():
        assert (one.delta, one.kl, one.agreement) == (0.0, 0.0, 1.0)


def test_kl_and_agreement_by_hand(words, monkeypatch):
    """In batches of one window: the same sums as over all logits at once."""
    args = quality.arguments(words)
    monkeypatch.setattr(quality_score, "LOGIT_BYTES", 1)
    run = quality.Run(args, print)
    model = run.dense()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
        ids = run.base.test["ja"]
        P, Q = (
            torch.log_softmax(m(input_ids=ids).logits[:, :-1].double(), -1)
            for m in (run.dense(), model)
        )
    one = quality_score.score(model, run.base).languages["ja"]
    assert one.kl == pytest.approx(float((P.exp() * (P - Q)).sum(-1).mean()), rel=1e-4)
    assert one.agreement == pytest.approx(float((P.argmax(-1) == Q.argmax(-1)).double().mean()))
    assert one.nll == pytest.approx(float(-Q.gather(-1, ids[:, 1:, None]).mean()), rel=1e-5)


def test_bits_are_those_of_the_files(done):
    """What the rulers are said to take is what our files of the same pattern take."""
    store = quality_store.read(done)
    for pattern, ruler in (("2:4 + int4", "sparsegpt"), ("int3", "gptq")):
        textbook = store.records[f"{pattern} | {ruler}", 0]["bits"]
        found = store.records[f"{pattern} | ours-plain", 0]["bits"]
        assert found == pytest.approx(textbook, abs=0.15)  # shapes of matrices as small as these
    assert store.records["2:4 | ours-plain", 0]["bits"] == 16.0
    nominal = [quality_rows.PATTERNS[p].nominal(128, True) for p in ("2:4 + int4", "50 % + int4")]
    assert nominal == [quality_rows.PATTERNS["int3"].nominal(128, True)] * 2 == [3.125] * 2


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="no row 'wandda'"):
        quality_rows.select(["wandda"], None)
    with pytest.raises(SystemExit, match="no pattern '2:5'"):
        quality_rows.select(None, ["2:5"])


def test_every_row_of_the_issue_is_in_the_plan():
    plan = {row.key for row in quality_rows.rows()}
    for pattern in ("50 %", "4:8", "2:4"):
        for name in ("magnitude", "wanda", "ria", "sparsegpt", "dass", "sparsegpt-mlp"):
            assert f"{pattern} | {name}" in plan
    for pattern in quality_rows.PATTERNS:
        assert {f"{pattern} | ours-{q}" for q in ("plain", "default", "high")} <= plan
    assert {"int4 | ours-search", "int3 | ours-search"} <= plan
    assert all(row.reference in plan for row in quality_rows.rows())


# ---- what is missing ----


def test_a_build_without_a_feature_says_so(monkeypatch):
    from distaya_ext import recipe

    monkeypatch.setattr(recipe, "Recipe", SimpleNamespace(model_fields={"method": None}))
    monkeypatch.setattr(recipe, "METHODS", ("sparsegpt", "gptq"))
    told = {row.id: quality_ours.missing(row) for row in quality_rows.rows() if row.side == "ours"}
    assert told.pop("ours-plain") is None
    told.pop("ours-search")
    assert "quality" in told["ours-high"] and "dass" in told["ours-dass"]
    assert all(told.values())


def test_a_row_that_fails_is_told_and_the_exit_code_says_so(words, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise ValueError(f"nothing fits in {tmp_path}/weights.bin")

    monkeypatch.setattr(quality_ours, "compress_once", refuse)
    out = tmp_path / "q.json"
    call = [*words, "--json", str(out), "--rows", "ours-plain", "rtn", "--seeds", "0"]
    assert quality.main([*call[: call.index("--patterns")], *call[call.index("--json") :]]) == 1
    assert "| missing: failed: nothing fits in weights.bin |" in capsys.readouterr().out
    assert "int3 | ours-plain" in quality_store.read(out).missing
    assert str(tmp_path) not in out.read_text()


def test_a_search_gets_the_size_of_the_uniform_row(done, words, tmp_path, monkeypatch, capsys):
    """A stand-in for the search: the recipe of int3 itself, for the budget it is asked."""
    asked = []

    def search(model, windows, options):
        asked.append((options.bits_per_weight, len(windows.ids)))
        found = Recipe(model=model, method="gptq", bits=3, group=32, symmetric=True)
        return SimpleNamespace(recipe=found)

    package = SimpleNamespace(Options=SimpleNamespace, search=search)
    monkeypatch.setitem(sys.modules, "distaya_ext.search", package)
    lone = [*words, "--rows", "ours-search", "--json", str(tmp_path / "lone.json")]
    assert quality.main(lone) == 1
    assert "run ours-plain at int3 too" in capsys.readouterr().out and not asked
    out = tmp_path / "q.json"
    out.write_text(done.read_text())
    assert quality.main([*words, "--rows", "ours-search", "--json", str(out), "--resume"]) == 0
    store = quality_store.read(out)
    plain_bits = store.records["int3 | ours-plain", 0]["bits"]
    assert asked == [(pytest.approx(plain_bits + 1e-4), 8)] * len(SEEDS)
    assert store.records["int3 | ours-search", 1]["bits"] == plain_bits
    assert "int3 | ours-search" not in store.missing


# ---- figures ----


def test_intervals_are_sane(done):
    store = quality_store.read(done)
    found = quality_stats.figures(store, quality_stats.rows_in(store))
    assert len(found) == len({key for key, _ in store.records})
    for f in found:
        low, high = f.delta_interval
        assert low <= f.delta <= high and low < high
        assert f.worst >= f.delta and f.worst_interval[0] <= f.worst <= f.worst_interval[1]
        assert f.kl >= 0 and f.kl_p99 >= f.kl and 0 <= f.agreement <= 1 and f.seconds > 0
        assert (f.ratio is None) == (f.row.key == f.row.reference)
        if f.ratio is not None:
            assert f.ratio_interval[0] <= f.ratio <= f.ratio_interval[1]


# ---- resuming and reporting ----


def test_a_finished_run_is_kept(done, words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "again.json"
    out.write_text(done.read_text())
    again = [*words, "--rows", "textbook", "--json", str(out)]
    with pytest.raises(SystemExit, match="exists: --resume"):
        quality.main(again)
    with pytest.raises(SystemExit, match=r"window \(32 there, 16 now\)"):
        quality.main([*again, "--resume", "--window", "16"])
    monkeypatch.setattr(quality, "textbook_compress", None)  # would fail when called
    assert quality.main([*again, "--resume"]) == 0
    assert "kept" in capsys.readouterr().out
    before, after = quality_store.read(done), quality_store.read(out)
    assert before.records == after.records and before.dense == after.dense


def test_rows_of_other_code_and_lost_ones_are_made_again(done, words, tmp_path, capsys):
    out, key = tmp_path / "again.json", "int3 | gptq"
    store = quality_store.read(done)
    store.path = out
    store.records[key, 0]["code"] = "older"
    store.records.pop((key, 1))
    store.save()
    assert quality.main([*words, "--rows", "gptq", "--json", str(out), "--resume"]) == 0
    assert "kept" not in capsys.readouterr().out
    first, second = quality_store.read(done).records, quality_store.read(out).records
    for seed in SEEDS:
        for name in ("delta", "kl", "windows"):
            assert first[key, seed][name] == second[key, seed][name]


def test_table_and_pictures_from_json_alone(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "run", None)
    picture = tmp_path / "quality.png"
    assert quality.main(["--from", str(done), "--picture", str(picture)]) == 0
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith("| 2:4 |")]
    assert [line.split(" | ")[1] for line in lines][:4] == [
        "magnitude",
        "Wanda",
        "RIA",
        "SparseGPT",
    ]
    assert len({line.count("|") for line in told.split("\n\n")[0].splitlines()}) == 1
    assert "missing: no search" in told and "no ratio of seconds is claimed" in told
    assert "bits per weight:" in told and "seeds 0, 1" in told
    assert "a standard deviation of at most" in told
    from matplotlib import image

    for path in (picture, tmp_path / "quality-size.png"):
        pixels = image.imread(path)
        assert pixels.shape[1] >= 500
        ink = (pixels[..., :3] < 0.9).any(-1)
        assert 0.005 < ink.mean() < 0.5
        orange = (pixels[..., 0] > 0.7) & (pixels[..., 1] < 0.4)
        assert orange.sum() > 20, "no mark of ours"


def test_no_path_of_the_machine_is_kept(done, words):
    text = done.read_text()
    assert not any(word in text for word in words if word.startswith("/"))
    assert json.loads(text)["settings"]["test"] == "texts/test"


def test_what_cannot_work_is_said_first(words, tmp_path, monkeypatch):
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(SystemExit, match=r"other.json holds no records"):
        quality.main(["--from", str(other)])
    with pytest.raises(SystemExit, match="is no folder"):
        quality.main([*words, "--model", str(tmp_path / "absent")])
    monkeypatch.setattr(quality, "run", None)  # would fail when called
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="need matplotlib"):
        quality.main([*words, "--picture", str(tmp_path / "x.png")])


def test_pictures_of_nothing_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no row"):
        quality_picture.draw([], tmp_path / "x.png")
