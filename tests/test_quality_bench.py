"""bench/quality.py on a tiny model: every kind of row, intervals, resuming, what is missing."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from speaking import SENTENCES, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    quality_timing,
)

PATTERNS = ("2:4", "2:4 + int4", "int3")
ROWS = (
    "magnitude", "wanda", "ria", "rtn", "sparsegpt", "gptq", "dass", "sparsegpt-mlp", "ours-plain",
    "ours-search",
)  # fmt: skip
SEEDS = (0, 1)


def save_texts(folder: Path, seed: int, documents: int = 6) -> Path:
    """Documents of shuffled sentences, so that two seeds share none."""
    folder.mkdir(parents=True)
    for lang, lines in SENTENCES.items():
        rng = random.Random(f"{seed}{lang}")
        each = [" ".join(rng.choices(lines, k=8)) + f" {seed}{n}" for n in range(documents)]
        (folder / f"{lang}.txt").write_text("\n".join(each) + "\n", encoding="utf-8")
    return folder


def train(folder: Path, texts: Path) -> None:
    """Teach the model the sentences a little: of a random one compression may lower the loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = plain.drawn(plain.read_folder(texts), tokenizer, 12, 32, 0).ids
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Arguments of every call: model (bf16, as scales are), texts, few windows, small groups."""
    root = tmp_path_factory.mktemp("bench")
    calibration = save_texts(root / "texts" / "train", 1)
    train(save_model(root / "tiny"), calibration)
    test = save_texts(root / "texts" / "test", 2)
    found = ["--model", root / "tiny", "--calibration", calibration, "--test", test]
    sizes = ["--windows", 8, "--window", 32, "--test-windows", 3, "--group", 32, "--seeds", *SEEDS]
    return [str(word) for word in (*found, *sizes, "--patterns", *PATTERNS)]


@pytest.fixture(scope="module")
def done(words, tmp_path_factory) -> Path:
    """The JSON of one run in a build that has no search."""
    out = tmp_path_factory.mktemp("results") / "quality.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "distaya_ext.search", None)
        assert quality.main([*words, "--rows", *ROWS, "--json", str(out)]) == 0
    return out


def rows_of(store: quality_store.Store) -> list[quality_rows.Row]:
    known = {key for key, _ in store.records} | set(store.missing)
    return [row for row in quality_rows.rows() if row.key in known]


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
        raise ValueError("nothing fits")

    monkeypatch.setattr(quality_ours, "compress_once", refuse)
    out = tmp_path / "q.json"
    call = [*words, "--json", str(out), "--rows", "ours-plain", "rtn", "--seeds", "0"]
    assert quality.main([*call[: call.index("--patterns")], *call[call.index("--json") :]]) == 1
    assert "missing: failed: nothing fits" in capsys.readouterr().out
    assert "int3 | ours-plain" in quality_store.read(out).missing


# ---- figures ----


def test_intervals_are_sane(done):
    store = quality_store.read(done)
    found = quality_stats.figures(store, rows_of(store))
    assert len(found) == len({key for key, _ in store.records})
    for f in found:
        low, high = f.delta_interval
        assert low <= f.delta <= high and low < high
        assert f.worst >= f.delta and f.worst_interval[0] <= f.worst <= f.worst_interval[1]
        assert f.kl >= 0 and f.kl_p99 >= f.kl and 0 <= f.agreement <= 1 and f.seconds > 0
        assert (f.ratio is None) == (f.row.key == f.row.reference)
        if f.ratio is not None:
            assert f.ratio_interval[0] <= f.ratio <= f.ratio_interval[1]


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
    found = {f.row.id: f for f in quality_stats.figures(store, rows_of(store))}
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
    (found,) = quality_stats.figures(store, rows_of(store))
    low, high = found.delta_interval
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


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


def test_pictures_of_nothing_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no row"):
        quality_picture.draw([], tmp_path / "x.png")


# ---- texts ----


def test_the_split_check_sees_shared_documents(words, tmp_path, capsys):
    train, test = save_texts(tmp_path / "a", 1), save_texts(tmp_path / "b", 2)
    assert quality_texts.shared(train, test).documents == []
    line = (train / "en.txt").read_text().splitlines()[3]
    with open(test / "en.txt", "a", encoding="utf-8") as file:
        file.write(f"  {line.replace(' ', '  ').upper()}\n")
    found = quality_texts.shared(train, test)
    assert len(found.documents) == 1
    call = [*words, "--split-check", "--calibration", str(train), "--test", str(test)]
    assert quality.main(call) == 1
    assert "1 documents" in capsys.readouterr().out


def test_the_split_check_knows_translations_by_their_key(tmp_path):
    for folder, lang, text in (("a", "en", "one"), ("b", "fr", "un")):
        (tmp_path / folder).mkdir()
        record = {"text": text, "doc": "guide-7"}
        (tmp_path / folder / f"{lang}.jsonl").write_text(json.dumps(record) + "\n")
    assert quality_texts.shared(tmp_path / "a", tmp_path / "b").documents == ["guide-7"]


def test_calibration_windows_by_seed(words):
    args = quality.arguments(words)
    run = quality.Run(args, print)
    first, second = (run.calibration(seed) for seed in (0, 1))
    assert first.ids.shape == second.ids.shape == (8, 32)
    assert not torch.equal(first.ids, second.ids)
    assert torch.equal(first.ids, quality.Run(args, print).calibration(0).ids)
    for one in (first, second):
        assert one.languages[:3] == one.languages[3:6] and sorted(one.languages[:3]) == [*SENTENCES]
        assert one.languages[6:] == one.languages[:2]


def test_test_windows_come_from_the_whole_file(words):
    args = quality.arguments(words)
    tokenizer = quality.Run(args, print).tokenizer
    few = quality_texts.test_windows(args.test, tokenizer, 16, 4)["en"]
    every = quality_texts.test_windows(args.test, tokenizer, 16, None)["en"]
    assert torch.equal(few, every[[len(every) * i // 4 for i in range(4)]])
    with pytest.raises(SystemExit, match="999 are needed"):
        quality_texts.test_windows(args.test, tokenizer, 16, 999)


# ---- time ----


def test_rounds_take_turns(words, tmp_path, monkeypatch):
    order: list[str] = []
    spent = {"ours-plain": 2.0, "ours-default": 3.0, "ours-high": 8.0}

    def clocked(row, drawn, options, out):
        order.append(row.id)
        return spent[row.id] + 0.1 * len(order), None

    monkeypatch.setattr(quality_ours, "compress_once", clocked)
    args = quality.arguments([*words, "--timing", "3"])
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
