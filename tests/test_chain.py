"""A whole chain: layers by score, 2:4 and int4, healing (faked here), evaluation; one command."""

import importlib.util
import json
import shutil

import chains
import pytest
from typer.testing import CliRunner

from distaya_ext.chain import Chained, StepFinished, StepStarted
from distaya_ext.chain.journal import WorkFolder, place
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import Report, budget, compress
from distaya_ext.errors import DistayaError, GateError, ResourceError, UsageError
from distaya_ext.recipe import Recipe
from distaya_ext.train.events import TrainStep

HEAL = {"steps": 3, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model of three layers and texts: source, calib, heldout."""
    folder = tmp_path_factory.mktemp("given")
    chains.shallow(folder / "source")
    chains.texts(folder / "calib")
    chains.texts(folder / "heldout", "evaluation")
    return folder


@pytest.fixture
def steps_done(monkeypatch):
    """Healing is faked; which of its steps were done."""
    done = []
    chains.give(monkeypatch, chains.fake_distill(done))
    return done


def whole(given, **fields):
    """drop, compress, heal, evaluate."""
    held = {"path": str(given / "heldout"), "tokens": 256, "window": 64}
    evaluate = held | fields.pop("evaluate", {})
    fields = {"heal": HEAL} | fields
    return chains.recipe(given / "source", given / "calib", evaluate=evaluate, **fields)


def run(given, out, recipe, **more):
    return compress(given / "source", out, recipe, **more)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_all_steps_in_order(given, steps_done, tmp_path):
    told = []
    found = run(given, tmp_path / "out", whole(given), on_event=told.append)
    assert isinstance(found, Chained) and found.kept == [] and found.gate is None
    names = ["drop", "compress", "heal", "evaluate"]
    assert told[0].message == "steps, in this order: drop, compress, heal, evaluate"
    assert [e.name for e in told if isinstance(e, StepStarted)] == names
    ends = [e for e in told if isinstance(e, StepFinished)]
    assert [(e.number, e.steps, e.name, e.kept) for e in ends] == [
        (i, 4, name, False) for i, name in enumerate(names, 1)
    ]
    out = tmp_path / "out"
    (gone,) = json.loads((out / "layers.json").read_text())["dropped"]
    assert found.dropped_layers == [gone] and gone not in found.source_layers
    assert len(found.source_layers) == open_checkpoint(out, packed=True).config.num_hidden_layers
    assert steps_done == [0, 1, 2] and (out / "training.json").is_file()
    # What was evaluated: before, compressed, healed, in two languages.
    assert list(found.evaluations) == ["compress", "heal"]
    before = [found.evaluations[step]["base_nll"] for step in found.evaluations]
    after = [found.evaluations[step]["nll"] for step in found.evaluations]
    assert before[0] == before[1] and len({before[0], *after}) == 3
    assert {r["language"] for r in found.evaluations["heal"]["languages"]} == {"en", "ja"}
    assert json.loads((out / "evaluation.json").read_text())["steps"] == found.evaluations
    listed = json.loads((out / "steps.json").read_text())["steps"]
    assert [step["name"] for step in listed] == names
    assert all(step["seconds"] > 0 and len(step["fingerprint"]) == 64 for step in listed)
    assert str(given) not in (out / "steps.json").read_text()
    assert hidden(tmp_path) == []
    # The recipe that is written says what was chosen, and repeats the run.
    resolved = Recipe.from_yaml(out / "recipe.yaml")
    assert resolved.drop_layers == [gone] and resolved.heal == whole(given).heal
    again = run(given, tmp_path / "again", resolved)
    assert [step.name for step in again.steps] == names[1:]
    first, second = chains.hashes(out), chains.hashes(tmp_path / "again")
    del first["layers.json"]
    assert first == second


def test_nothing_is_faked(given, tmp_path):
    """The bundled model loses a layer, half its weights and 12 bits of each, and is healed."""
    source = chains.ASSETS / "nano-aya"
    heal = {"steps": 6, "batch_tokens": 256, "window": 64, "rank": 8, "evaluate_every": 3}
    evaluate = {"path": str(given / "heldout"), "tokens": 512, "window": 64}
    recipe = chains.recipe(source, given / "calib", heal=heal, evaluate=evaluate, group=64)
    told = []
    found = compress(source, tmp_path / "out", recipe, on_event=told.append)
    assert [event.step for event in told if isinstance(event, TrainStep)] == [1, 2, 3, 4, 5, 6]
    compressed, healed = found.evaluations.values()
    assert compressed["base_nll"] < healed["nll"] < compressed["nll"]
    assert len(found.source_layers) == 7 and len(found.dropped_layers) == 1
    checkpoint = open_checkpoint(tmp_path / "out", packed=True)
    assert checkpoint.config.num_hidden_layers == 7 and len(checkpoint.stored) == 49
    for name in ("layers.json", "training.json", "evaluation.json", "results.json", "layers.csv"):
        assert (tmp_path / "out" / name).is_file(), name
    assert Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").heal == recipe.heal
    trained = json.loads((tmp_path / "out" / "training.json").read_text())
    assert trained["student"] == "compress" and trained["teacher"] == str(source)
    assert hidden(tmp_path) == []


def test_a_plain_recipe_is_what_it_was(given, tmp_path):
    recipe = Recipe(model=str(given / "source"), method="dense", drop_layers=[1])
    assert not recipe.chained
    found = run(given, tmp_path / "out", recipe)
    assert isinstance(found, Report)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not written & {"steps.json", "evaluation.json", "layers.json"}
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    assert text.endswith("drop_layers:\n- 1\n")
    assert isinstance(run(given, tmp_path / "more", recipe, restart=True), Report)


def test_results_of_a_chain_are_not_copied_into_the_next(given, steps_done, tmp_path):
    evaluate = {"path": str(given / "heldout"), "tokens": 256, "window": 64}
    dense = Recipe(
        model="m", method="dense", drop_layers={"count": 1, "score": "bi", "tokens": 256},
        calibration={"path": str(given / "calib"), "tokens": 256, "window": 64},
        evaluate=evaluate,
    )  # fmt: skip
    found = run(given, tmp_path / "out", dense)
    assert [step.name for step in found.steps] == ["drop", "compress", "evaluate"]
    compress(tmp_path / "out", tmp_path / "next", Recipe(model="m", method="rtn", bits=8))
    written = {path.name for path in (tmp_path / "next").iterdir()}
    assert not written & {"steps.json", "evaluation.json", "layers.json"}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"evaluate": {"path": "nowhere"}}, ["nowhere does not exist"]),
        ({"evaluate": {"window": 100000}}, ["windows of 100000", "positions"]),
        ({"heal": {"steps": 1, "path": "nowhere"}}, ["nowhere does not exist"]),
        ({"heal": {"window": 100000, "batch_tokens": 100000}}, ["windows of 100000"]),
        ({"drop_layers": 3}, ["dropping 3 layers", "the model has 3"]),
        ({"drop_layers": [7]}, ["layer 7", "the model has 3"]),
        ({"skip": ["nothing"]}, ["'nothing' matches none"]),
    ],
)
def test_what_cannot_end_does_not_start(given, steps_done, tmp_path, fields, words):
    with pytest.raises(DistayaError) as caught:
        run(given, tmp_path / "out", whole(given, **fields))
    assert all(word in str(caught.value) for word in words), caught.value
    assert list(tmp_path.iterdir()) == []


def test_texts_and_packages_that_are_not_there(given, steps_done, tmp_path, monkeypatch):
    bare = {"calibration": {"tokens": 512, "window": 64}}
    with pytest.raises(UsageError, match="by score measures on texts, and none are given"):
        run(given, tmp_path / "out", whole(given, **bare))
    with pytest.raises(UsageError, match="needs calibration texts"):
        run(given, tmp_path / "out", whole(given, drop_layers=[1], **bare))
    with pytest.raises(UsageError, match="heal learns from a folder of texts"):
        dense = {"method": "dense", "nm": None, "bits": None, "quality": None}
        run(given, tmp_path / "out", whole(given, drop_layers=[1], **bare, **dense))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"accelerate.*: pip install 'distaya-ext\[train\]'"):
        run(given, tmp_path / "out", whole(given))
    assert list(tmp_path.iterdir()) == []


def test_room_on_the_disk(given, steps_done, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    source = (given / "source" / "model.safetensors").stat().st_size
    # The compressed model and the healed one, each smaller than the source.
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: usage._replace(free=source // 2))
    with pytest.raises(ResourceError, match="are free there"):
        run(given, tmp_path / "out", whole(given, heal={**HEAL, "train": "full"}))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: usage._replace(free=4 * source))
    run(given, tmp_path / "out", whole(given))


def test_a_failed_gate_keeps_the_result(given, steps_done, tmp_path):
    found = run(
        given, tmp_path / "out", whole(given, evaluate={"gate": {"max_worst_ppl_ratio": 1.0001}})
    )
    assert "the worst language" in found.gate
    with pytest.raises(GateError, match=r"quality gate failed.*the result is kept in"):
        found.check_gate()
    assert open_checkpoint(tmp_path / "out", packed=True).scheme is not None
    assert hidden(tmp_path) == []


def test_two_runs_at_once(given, steps_done, tmp_path):
    with WorkFolder(tmp_path / "out"):
        with pytest.raises(
            UsageError, match=r"another run \(process \d+\) is at work in .*\.out\.chain"
        ):
            run(given, tmp_path / "out", whole(given))
        assert place(tmp_path / "out").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(given, steps_done, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {given / 'source'}\nnm: 2:4\nbits: 4\nquality: plain\n"
        "heal: {learning_rate: 0.01}\n"
        f"calibration: {{path: {given / 'calib'}, tokens: 512, window: 64}}\n"
        "evaluate: {path: nowhere, tokens: 256, window: 64, gate: {max_gap: 0.0}}\n"
    )
    told = CliRunner().invoke(
        app,
        ["compress", "--recipe", str(recipe), "--out", "out", "--drop-layers", "34%", "--heal", "2",
         "--evaluate", str(given / "heldout"), "--group", "32"],
    )  # fmt: skip
    assert told.exit_code == 6, told.output
    for line in ("step 1 of 4: drop", "step 2 of 4: compress", "step 4 of 4: evaluate done in",
                 "1 layers left out, 2 written", "the result is kept in out"):  # fmt: skip
        assert line in told.output, told.output
    heads = [line for line in told.stdout.splitlines() if "after compress" in line]
    assert len(heads) == 1 and "before" in heads[0] and "after heal" in heads[0]
    cells = [line.strip("│┃ ").split() for line in told.stdout.splitlines()]
    assert {"en", "ja", "all"} <= {cell[0] for cell in cells if cell}
    written = Recipe.from_yaml(tmp_path / "out" / "recipe.yaml")
    assert written.heal.steps == 2 and written.heal.learning_rate == 0.01
    assert len(written.drop_layers) == 1 and written.evaluate.gate == {"max_gap": 0.0}
    told = CliRunner().invoke(
        app, ["compress", str(given / "source"), "--out", "less", "--drop-layers", "2,",
              "--evaluate", str(given / "heldout"), "--json", "--quiet"],
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [step["name"] for step in found["steps"]] == ["compress", "evaluate"]
    assert found["dropped_layers"] == [2] and found["gate"] is None
    assert found["evaluations"]["compress"]["worst_language"] in ("en", "ja")
