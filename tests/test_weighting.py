"""What recipes and flags may say about languages; everything else is refused in one sentence."""

from functools import partial

import pytest
import refusing

from distaya_ext.cli.compress import build_recipe
from distaya_ext.cli.languages import parse_quotas, parse_weights
from distaya_ext.cli.progress import Reporter
from distaya_ext.compress import events
from distaya_ext.errors import UsageError
from distaya_ext.recipe import CalibrationSpec, Recipe

refused = partial(refusing.refused, UsageError)


@pytest.mark.parametrize("weights", ["equal", "proportional", "worst", {"en": 2.0, "zh-Hant": 0.0}])
@pytest.mark.parametrize("quotas", [None, {"en": 4096, "sw": 0}])
def test_recipes_survive_a_file(tmp_path, weights, quotas):
    spec = CalibrationSpec(weights=weights, quotas=quotas)
    recipe = Recipe(model="m", nm="2:4", calibration=spec)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_tokens_count_alike_unless_asked():
    spec = CalibrationSpec()
    assert spec.weights == "proportional" and spec.quotas is None


NUMBER = float("nan"), float("inf"), -1.0, 1e9, 1e-9, True, "2", None, [1]


@pytest.mark.parametrize("number", NUMBER)
def test_weights_that_are_none(number):
    refused(lambda: CalibrationSpec(weights={"en": number}), "weights give en", str(number)[:1])


@pytest.mark.parametrize("number", [float("nan"), -1, 1.5, 1 << 50, True, "2", None])
def test_quotas_that_are_none(number):
    refused(lambda: CalibrationSpec(quotas={"en": number}), "quotas give en", str(number)[:3])


@pytest.mark.parametrize("field", ["weights", "quotas"])
@pytest.mark.parametrize(
    "value, words",
    [
        ({}, "{language:"),
        (["en"], "{language:"),
        ({"English": 1}, "'English'"),
        ({5: 1}, "'5'"),
        ({False: 1}, "'no'"),
    ],
)
def test_languages_that_are_none(field, value, words):
    refused(lambda: CalibrationSpec(**{field: value}), field, words)


def test_norwegian_in_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nnm: '2:4'\ncalibration:\n  weights: {no: 2}\n")
    refused(lambda: Recipe.from_yaml(path), "recipe.yaml", "calibration", "'no'")
    path.write_text("model: m\nnm: '2:4'\ncalibration:\n  weights: {'no': 2}\n")
    assert Recipe.from_yaml(path).calibration.weights == {"no": 2.0}


def test_a_weighting_nobody_knows():
    refused(lambda: CalibrationSpec(weights="best"), "'best'", "equal, proportional, worst")


# ---- flags ----


def test_flags(tmp_path):
    assert parse_weights("worst") == "worst"
    assert parse_weights("en=2,sw=5.5") == {"en": 2.0, "sw": 5.5}
    path = tmp_path / "weights.yaml"
    path.write_text("en: 2\nsw: 5\n")
    assert parse_weights(str(path)) == {"en": 2, "sw": 5}
    assert parse_quotas(["en=4096", "sw=1,ja=2"]) == {"en": 4096, "sw": 1, "ja": 2}


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: parse_weights("best"), ["'best'", "en=2,sw=5"]),
        (lambda: parse_weights("en=two"), ["'en=two'"]),
        (lambda: parse_weights("en=1,en=2"), ["en twice"]),
        (lambda: parse_weights("none.yaml"), ["none.yaml", "cannot be read"]),
        (lambda: parse_quotas(["en"]), ["--quota 'en'"]),
        (lambda: parse_quotas(["en=1.5"]), ["--quota 'en=1.5'"]),
        (lambda: parse_quotas(["en=1", "en=2"]), ["en twice"]),
    ],
)
def test_flags_that_are_none(call, words):
    refused(call, *words)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nnm: '2:4'\ncalibration: {weights: equal, tokens: 512}\n")
    recipe = build_recipe(path, calibration={"weights": {"en": 2.0}, "quotas": None})
    assert recipe.calibration.weights == {"en": 2.0} and recipe.calibration.tokens == 512
    recipe = build_recipe(path, calibration={"weights": None, "quotas": {"en": 256}})
    assert recipe.calibration.weights == "equal" and recipe.calibration.quotas == {"en": 256}


def test_heartbeat_names_the_language_that_lost_most(capsys):
    with Reporter() as reporter:
        reporter.on_event(events.LayerStart(0, 1))
        reporter.on_event(
            events.LanguagesDone(0, {"en": 0.25, "sw": 0.75}, {"en": 0.01, "sw": 0.02})
        )
        reporter.on_event(events.LayerDone(0, 1, 1.0))
    assert "most moved sw 2.00e-02 (weight 1.50)" in capsys.readouterr().err
