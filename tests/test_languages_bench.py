"""bench/languages.py: its ratios, and that the arms differ in calibration alone."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import languages


def test_worst_language_is_that_of_the_mean_over_seeds():
    runs = [
        {"en": np.array([0.1, 0.3]), "ja": np.array([0.5, 0.1])},
        {"en": np.array([0.4, 0.6]), "ja": np.array([0.2, 0.4])},
    ]
    assert languages.worst_of(runs) == (pytest.approx(0.35), "en")
    assert languages.worst_of(runs[:1]) == (pytest.approx(0.3), "ja")


def test_ratios_are_paired_by_window():
    windows = {lang: np.linspace(0.5, 1.5, 8) + at for at, lang in enumerate(("en", "ja"))}
    found = {
        arm: [{lang: factor * v for lang, v in windows.items()}]
        for arm, factor in zip(languages.ARMS, (1.0, 0.5, 0.4), strict=True)
    }
    english, equal, worst = languages.table(found).splitlines()[2:]
    assert "| ja +2.000 | +1.500 |  | 2.000 [2.00, 2.00] |" in english
    assert "0.500 [0.50, 0.50] |  |" in equal  # no spread: every draw has the same ratio
    assert "0.400 [0.40, 0.40] | 0.800 [0.80, 0.80] |" in worst


def test_arms_see_as_many_tokens_and_differ_in_weights_or_languages(tmp_path, monkeypatch, capsys):
    seen = []

    def judged(model, base, windows, weights):
        seen.append((windows.ids.shape, set(windows.languages), weights))
        return {lang: np.full(len(v), 0.1 * len(seen)) for lang, v in base.test.items()}

    monkeypatch.setattr(languages, "judged", judged)
    threads = torch.get_num_threads()
    out = tmp_path / "found.json"
    words = f"--seeds 0 --windows 16 --window 64 --test-windows 2 --json {out}".split()
    try:
        assert languages.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    shapes, spoken, weights = zip(*seen, strict=True)
    assert len(set(shapes)) == 1
    assert spoken[0] == {"en"} and spoken[1] == spoken[2] and len(spoken[1]) == 16
    assert weights == ("proportional", "equal", "worst")
    assert set(json.loads(out.read_text())["deltas"]) == set(languages.ARMS)
    assert "| worst |" in capsys.readouterr().out
