"""Recipes of chains: layers by score, healing, evaluation, and what of them cannot run."""

import pytest
from test_recipe import refused

from distaya_ext.recipe import DropSpec, EvaluateSpec, HealSpec, Recipe


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("drop_layers: 4", DropSpec(count=4)),
        ("drop_layers: 25%", DropSpec(share=0.25)),
        ("drop_layers: '3,'", [3]),
        ("drop_layers: 5,3", [3, 5]),
        ("drop_layers: [5, 3]", [3, 5]),
        ("drop_layers: {count: 2, score: bi}", DropSpec(count=2, score="bi")),
    ],
)
def test_layers_to_drop(tmp_path, line, expected):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\nmethod: dense\n{line}\n")
    recipe = Recipe.from_yaml(path)
    assert recipe.drop_layers == expected
    assert recipe.chained == isinstance(expected, DropSpec)
    assert recipe.alone([1]).drop_layers == [1] and not recipe.alone([1]).chained


def test_short_ways_to_heal_and_evaluate(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nnm: 2:4\nheal: 500\nevaluate: texts\n")
    recipe = Recipe.from_yaml(path)
    assert recipe.heal == HealSpec(steps=500) and recipe.evaluate == EvaluateSpec(path="texts")
    assert recipe.chained and recipe.alone([]) == Recipe(model="m", nm="2:4")
    # The defaults of `distaya heal`; a cache holds no hidden states.
    assert (recipe.heal.loss.kl, recipe.heal.loss.cosine) == (1.0, 1.0)
    assert HealSpec(loss={"temperature": 2}).loss.cosine == 1.0
    assert HealSpec(loss={"cache": 8}).loss.cosine == 0.0
    assert HealSpec(loss={"ce": 1.0}).loss.cosine == 0.0


def test_a_recipe_of_one_step_writes_what_it_always_did():
    text = Recipe(model="m", sparsity=0.5).to_yaml()
    assert text.endswith("drop_layers: []\n") and "heal" not in text and "evaluate" not in text


PRUNED, PACKED = {"nm": "2:4"}, {"nm": "2:4", "bits": 4}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (PRUNED | {"drop_layers": {"count": 2, "share": 0.5}}, ["drop_layers: ", "a count or a"]),
        (PRUNED | {"drop_layers": {}}, ["drop_layers: say how many"]),
        (PRUNED | {"drop_layers": {"cuont": 2}}, ["drop_layers: ", "'cuont'", "'count'"]),
        (PRUNED | {"drop_layers": {"count": 2, "score": "x"}}, ["drop_layers: ", "score"]),
        (PRUNED | {"drop_layers": "100%"}, ["drop_layers 100%", "between 0% and 100%"]),
        (PRUNED | {"drop_layers": 0}, ["drop_layers 0", "at least 1"]),
        (PRUNED | {"drop_layers": -2}, ["drop_layers '-2'", "such as 3,5"]),
        (PRUNED | {"drop_layers": True}, ["drop_layers True", "list"]),
        (PRUNED | {"drop_layers": [1, "x"]}, ["drop_layers.1 'x'", "integer"]),
        (PRUNED | {"drop_layers": None}, ["drop_layers None", "list"]),
        (PRUNED | {"heal": True}, ["heal True"]),
        (PRUNED | {"heal": 0}, ["heal: steps 0"]),
        (PRUNED | {"heal": {"step": 5}}, ["heal: ", "'step'", "'steps'"]),
        (PRUNED | {"heal": {"loss": {"kll": 1}}}, ["heal: loss: ", "'kll'", "'kl'"]),
        (PRUNED | {"heal": {"loss": {"kl": 0}}}, ["heal: loss: every weight", "is 0"]),
        (PRUNED | {"heal": {"window": 4096}}, ["heal: ", "less than one window of 4096"]),
        (PRUNED | {"heal": {"train": "scales"}}, ["heal trains scales", "quantises nothing"]),
        (PRUNED | {"heal": {"also": ["scales"]}}, ["heal trains scales"]),
        ({"method": "dense", "heal": 5}, ["this recipe changes nothing"]),
        (PACKED | {"format": "dense", "heal": 5}, ["4 bits", "off their grid", "format auto"]),
        (PACKED | {"bits": 5, "heal": 5}, ["5 bits", "off their grid", "3, 4, 8 bits"]),
        (PRUNED | {"modules": [{"match": "q", "bits": 6}], "heal": 5}, ["6 bits"]),
        (PRUNED | {"evaluate": {}}, ["evaluate: it lacks 'path'"]),
        (PRUNED | {"evaluate": {"path": "t", "tokns": 9}}, ["evaluate: ", "'tokns'", "'tokens'"]),
        (PRUNED | {"evaluate": {"path": "t", "tokens": 9, "per_line": True}}, ["tokens (9)"]),
        (
            PRUNED | {"evaluate": {"path": "t", "gate": {"max_worst_ppl_ratio": 0}}},
            ["evaluate: gate max_worst"],
        ),
        (PRUNED | {"evaluate": 5}, ["evaluate 5"]),
    ],
)
def test_chains_that_cannot_run(fields, words):
    refused(lambda: Recipe(**{"model": "m", **fields}), *words)


def test_healing_of_a_model_that_is_left_as_it_is_needs_a_teacher():
    assert Recipe(model="m", method="dense", heal={"steps": 5, "teacher": "t"}).chained
    assert Recipe(model="m", method="dense", drop_layers=[1], heal=5).heal.teacher is None
