"""Evaluation: every figure against a second way to compute it."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from refusing import refused
from speaking import SENTENCES, save_model, save_texts, tokenizer

from distaya_ext.errors import GateError, InputError, UsageError
from distaya_ext.evaluate import Loaded, cut_lines, cut_windows, evaluate, evaluate_loaded, load
from distaya_ext.evaluate.result import Evaluation, LanguageResult
from distaya_ext.evaluate.score import score
from distaya_ext.evaluate.statistics import interval


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "a", seed=1), save_model(root / "b", seed=2)


@pytest.fixture(scope="module")
def loaded(models):
    return [load(folder) for folder in models]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"), repeat=4)


def by_hand(model, base, row):
    """nll, KL(base || model) and agreement of one row, token by token in float64."""
    with torch.no_grad():
        p, q = (m(row[None]).logits[0, :-1].double().softmax(-1) for m in (base, model))
    nll = -q[torch.arange(len(row) - 1), row[1:]].log()
    return nll, (p * (p / q).log()).sum(-1), p.argmax(-1) == q.argmax(-1)


def test_scores_against_float64_and_padding_changes_nothing(loaded):
    base, model = (item.model for item in loaded)
    rows = [
        torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n))
        for n in (9, 2, 30, 17)
    ]
    of_base, of_model = score([base, model], rows)
    assert of_base.tokens.tolist() == [8, 1, 29, 16]
    assert not of_base.kl.any() and not of_base.kl_tokens.size
    for i, row in enumerate(rows):
        nll, kl, same = by_hand(model, base, row)
        assert of_model.nll[i] == pytest.approx(nll.sum().item(), rel=1e-5)
        assert of_model.kl[i] == pytest.approx(kl.sum().item(), rel=1e-4)
        assert of_model.same[i] == same.sum().item()
    assert of_model.kl_tokens.size == 54
    assert of_model.kl_tokens.sum() == pytest.approx(of_model.kl.sum(), rel=1e-5)


def test_scores_do_not_depend_on_the_memory_given(loaded, monkeypatch):
    rows = [torch.arange(3, 3 + n) for n in (5, 40, 12, 40)]
    want = score([item.model for item in loaded], rows)[1]
    monkeypatch.setattr(import_module("distaya_ext.evaluate.score"), "_LOGIT_BYTES", 1)
    monkeypatch.setattr(import_module("distaya_ext.evaluate.score"), "_SOFTMAX_BYTES", 7 * 4 * 300)
    got = score([item.model for item in loaded], rows)[1]
    np.testing.assert_allclose(got.nll, want.nll, rtol=1e-6)
    np.testing.assert_allclose(got.kl, want.kl, rtol=1e-5)


def test_windows_are_the_stream_cut_every_window(models):
    read = tokenizer()
    samples = {s.language: s for s in cut_windows(SENTENCES, read, window=10)}
    for lang, lines in SENTENCES.items():
        stream = [i for s in lines for i in [1, *read(s, add_special_tokens=False)["input_ids"]]]
        rows = torch.stack(samples[lang].rows)
        assert rows.flatten().tolist() == stream[: len(stream) // 10 * 10]
        size = sum(len(s.encode()) for s in lines)
        assert samples[lang].bytes_per_token == size / (len(stream) - len(lines))


def test_token_cap_is_the_same_in_every_language():
    samples = cut_windows(SENTENCES, tokenizer(), window=10, tokens=65)
    assert [len(s.rows) for s in samples] == [2, 2, 2]
    refused(
        InputError, lambda: cut_windows(SENTENCES, tokenizer(), window=10, tokens=29), "29", "30"
    )
    refused(InputError, lambda: cut_windows({"en": ["a"]}, tokenizer(), window=10), "en 2")
    refused(InputError, lambda: cut_windows(SENTENCES, tokenizer(), window=1), "2 tokens")


def test_lines_begin_with_bos_and_must_fit():
    samples = cut_lines(SENTENCES, tokenizer(), longest=128)
    assert all(row[0] == 1 for s in samples for row in s.rows)
    assert [len(s.rows) for s in samples] == [3, 3, 3]
    refused(InputError, lambda: cut_lines(SENTENCES, tokenizer(), longest=5), "line 1 of en", "5")
    refused(
        InputError,
        lambda: cut_lines({"en": ["a", "b"], "ja": ["c"]}, tokenizer(), longest=9),
        "ja 1",
    )
    refused(InputError, lambda: cut_lines({"en": ["a"]}, tokenizer(False), longest=9), "1 tokens")


def test_figures_of_a_comparison(models, loaded, texts):
    found = evaluate(models[1], texts, against=models[0], window=16)
    losses = [row.dnll for row in found.languages]
    assert losses == sorted(losses, reverse=True) and found.worst is found.languages[0]
    base, model = (item.model for item in loaded)
    for sample in cut_windows({k: v * 4 for k, v in SENTENCES.items()}, tokenizer(), window=16):
        own = torch.cat([by_hand(model, base, row)[0] for row in sample.rows])
        before = torch.cat([by_hand(base, base, row)[0] for row in sample.rows])
        kl = torch.cat([by_hand(model, base, row)[1] for row in sample.rows])
        row = found[sample.language]
        assert row.tokens == len(own) and row.samples == len(sample.rows)
        assert row.nll == pytest.approx(own.mean().item(), rel=1e-5)
        assert row.base_nll == pytest.approx(before.mean().item(), rel=1e-5)
        assert row.dnll == pytest.approx((own - before).mean().item(), abs=1e-5)
        assert row.ppl_ratio == pytest.approx(math.exp(row.dnll))
        assert row.kl == pytest.approx(kl.mean().item(), rel=1e-4)
        assert row.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
        bits = row.nll / math.log(2) / sample.bytes_per_token
        assert row.bits_per_byte == pytest.approx(bits)
        assert row.dnll_interval[0] <= row.dnll <= row.dnll_interval[1]
    assert found.gap == pytest.approx(losses[0] - np.median(losses))
    tokens = [row.tokens for row in found.languages]
    assert found.nll == pytest.approx(np.average([r.nll for r in found.languages], weights=tokens))


def test_a_model_compared_with_itself_lost_nothing(models, texts):
    found = evaluate(models[0], texts, against=models[0], per_line=True)
    for row in found.languages:
        assert row.dnll == 0.0 and row.dnll_interval == (0.0, 0.0) and row.ppl_ratio == 1.0
        assert row.kl == 0.0 and row.agreement == 1.0
    found.gate(max_worst_ppl_ratio=1.0, max_gap=0.0)


def test_sentences_are_paired_with_english(loaded):
    samples = cut_lines(SENTENCES, tokenizer(), longest=128)
    (found,) = evaluate_loaded(loaded[1:], samples, base=loaded[0])
    rows = {s.language: s.rows for s in samples}
    base, model = (item.model for item in loaded)

    def lost(row):
        return float((by_hand(model, base, row)[0] - by_hand(base, base, row)[0]).sum())

    over = [lost(ja) - lost(en) for ja, en in zip(rows["ja"], rows["en"], strict=True)]
    assert found["ja"].over_english == pytest.approx(np.mean(over), abs=1e-4)
    low, high = found["ja"].over_english_interval
    assert min(over) - 1e-4 <= low <= high <= max(over) + 1e-4
    assert found["en"].over_english is None
    assert found["en"].sentence_dnll == pytest.approx(
        np.mean([lost(r) for r in rows["en"]]), abs=1e-4
    )


def test_one_model_alone(models, texts):
    found = evaluate(models[0], texts, window=16)
    assert not found.compared and found.gap is None and found.worst.dnll is None
    assert "base_nll" not in found.to_dict()
    assert found.nll == evaluate(models[1], texts, against=models[0], window=16).base_nll


def test_progress_counts_every_token_once(loaded, texts):
    seen = []
    samples = cut_windows(SENTENCES, tokenizer(), window=8)
    evaluate_loaded(
        loaded[1:], samples, base=loaded[0], window=8, on_progress=lambda *args: seen.append(args)
    )
    total = sum(7 * len(s.rows) for s in samples)
    assert seen[-1][:2] == (total, total)
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        weights = rng.integers(5, 50, 60).astype(float)
        low, high = interval(weights * 0.3 + rng.normal(0, 4, 60), weights, resamples=400)
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 300 <= 0.99


def test_interval_is_the_same_every_time_and_needs_two_samples():
    sums, weights = np.arange(1.0, 9.0), np.full(8, 2.0)
    assert interval(sums, weights) == interval(sums, weights)
    assert interval(sums[:1], weights[:1]) is None
    low, high = interval(sums, weights)
    assert 0.5 <= low < sums.sum() / weights.sum() < high <= 4.0


def test_interval_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    sums, weights = np.arange(1.0, 9.0), np.full(8, 2.0)
    want = interval(sums, weights)
    monkeypatch.setattr(import_module("distaya_ext.evaluate.statistics"), "_AT_ONCE", 100)
    assert interval(sums, weights) == want


def made_up(**losses):
    rows = [
        LanguageResult(lang, 3, 10, 3 + d, 1.0, base_nll=3.0, dnll=d, ppl_ratio=math.exp(d))
        for lang, d in losses.items()
    ]
    return Evaluation("new", "old", sorted(rows, key=lambda r: -r.dnll), "windows", 8, 0.1)


def test_gate():
    found = made_up(en=0.1, ja=0.5, sw=0.2)
    assert found.gap == pytest.approx(0.3)
    found.gate(max_worst_ppl_ratio=1.65, max_gap=0.31)
    refused(GateError, lambda: found.gate(max_worst_ppl_ratio=1.6), "ja", "1.6487", "1.6 allowed")
    refused(GateError, lambda: found.gate(max_gap=0.29), "ja", "0.3000", "0.29 allowed")
    refused(GateError, lambda: found.gate(max_worst_ppl_ratio=1, max_gap=0), "1.6487", "0.3000")
    assert GateError.exit_code == 6


def test_gate_does_not_let_nan_through():
    refused(GateError, lambda: made_up(en=math.nan).gate(max_worst_ppl_ratio=2.0), "nan")


def test_models_that_cannot_be_compared(models, texts, tmp_path):
    other = save_model(tmp_path / "wide", vocab=310)
    refused(InputError, lambda: evaluate(other, texts, against=models[0]), "310", "300")
    renamed = save_model(tmp_path / "renamed")
    file = renamed / "tokenizer.json"
    file.write_text(file.read_text().replace('"<pad>"', '"<nil>"'))
    config = renamed / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<pad>"', '"<nil>"'))
    refused(InputError, lambda: evaluate(renamed, texts, against=models[0]), "tokenizers", "differ")


def test_tokenizer_larger_than_the_embedding(tmp_path, texts):
    small = save_model(tmp_path / "small", vocab=40)
    refused(InputError, lambda: evaluate(small, texts, window=8), "token", "40 rows")


def test_nan_is_told_with_its_language(loaded):
    model = load_broken(loaded[0])
    samples = cut_windows({"ja": SENTENCES["ja"]}, tokenizer(), window=8)
    refused(
        InputError, lambda: evaluate_loaded([model], samples, window=8), "NaN", "sample 1", "ja"
    )


def load_broken(item):
    import copy

    broken = copy.deepcopy(item.model)
    broken.model.norm.weight.data[0] = math.nan
    return Loaded("broken", broken, item.tokenizer)


def test_models_that_cannot_be_loaded(models, tmp_path, texts):
    refused(InputError, lambda: load(tmp_path / "none"), "none")
    refused(UsageError, lambda: load(models[0], dtype="int8"), "'int8'", "float32")
    bare = save_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(InputError, lambda: evaluate(bare, texts), "bare has no tokenizer")
    (bare / "tokenizer.json").write_text("{")
    refused(InputError, lambda: load(bare), "tokenizer of bare")


def test_loading_leaves_transformers_as_it_was(models):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    item = load(models[0], dtype="bfloat16")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert next(item.model.parameters()).dtype == torch.bfloat16 and not item.model.training
