"""A chain that is killed goes on where it was, and ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chains
import pytest
import torch

from distaya_ext.chain import journal
from distaya_ext.compress import compress
from distaya_ext.errors import DistayaError, InputError, UsageError
from distaya_ext.resume.identity import difference, fingerprint
from distaya_ext.train.events import TrainStep

HEAL = {"steps": 4, "learning_rate": 0.01}
SCORED = {"count": 1, "score": "bi", "tokens": 256}

# Every run is a process of its own, forked before any kernel has run, and killed where it is told.
SCRIPT = f"""
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import chains
from distaya_ext.chain import StepFinished
from distaya_ext.compress import compress, events
from transformers import AutoTokenizer, CohereForCausalLM  # once, not in every process

def killed(do):
    child = os.fork()
    if not child:
        do()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def die(here):
    if here:
        os.kill(os.getpid(), signal.SIGKILL)

def run(out, on_event=lambda event: None, at_step=lambda step: None):
    chains.give(None, chains.fake_distill(at_step=at_step))
    compress(recipe.model, out, recipe, on_event=on_event)

given = Path(sys.argv[1])
recipe = chains.recipe(given / "source", given / "calib", heal={HEAL!r})
drop_done = lambda event: die(isinstance(event, StepFinished) and event.name == "drop")
in_layer = lambda event: die(isinstance(event, events.LayerDone))
saved = lambda event: die(isinstance(event, events.Saved))
healing = lambda step: die(step == 2)
codes = [
    killed(lambda: run("out", on_event=drop_done)),
    killed(lambda: run("out", on_event=in_layer)),
    killed(lambda: run("out", on_event=saved)),
    killed(lambda: run("out", at_step=healing)),
]
left = sorted(path.name for path in Path(".out.chain").iterdir())
codes += [killed(lambda: run("out")), killed(lambda: run("straight"))]
print(json.dumps([codes, left]))
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    chains.shallow(folder / "source")
    chains.texts(folder / "calib")
    chains.texts(folder / "heldout", "evaluation")
    return folder


def chain(given, **fields):
    fields = {"drop_layers": [1], "heal": HEAL} | fields
    return chains.recipe(given / "source", given / "calib", **fields)


def test_killed_anywhere(given, tmp_path):
    """After the choice of layers, within a layer, after the compressed model, within healing."""
    one = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(given)], capture_output=True, text=True,
        timeout=300, env=os.environ | one,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    codes, left = json.loads(told.stdout)
    assert codes == [-signal.SIGKILL] * 4 + [0, 0], told.stderr
    assert left == ["compress", "drop", "heal.work", "lock", "steps.json"]
    assert chains.hashes(tmp_path / "out") == chains.hashes(tmp_path / "straight")
    steps = [
        json.loads((tmp_path / name / "steps.json").read_text()) for name in ("out", "straight")
    ]
    assert [s["fingerprint"] for s in steps[0]["steps"]] == [
        s["fingerprint"] for s in steps[1]["steps"]
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


REAL = {"steps": 5, "batch_tokens": 128, "window": 64, "rank": 4, "save_every": 2}

KILLED_IN_TRAINING = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import chains
from distaya_ext.compress import compress
from distaya_ext.train.events import TrainStep

def die(event):
    if isinstance(event, TrainStep) and event.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

given = Path(sys.argv[1])
recipe = chains.recipe(given / "source", given / "calib", drop_layers=[1], heal={REAL!r})
compress(recipe.model, "out", recipe, on_event=die)
"""


def test_killed_within_real_training(given, tmp_path):
    one = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    told = subprocess.run(
        [sys.executable, "-c", KILLED_IN_TRAINING, str(given)], capture_output=True, text=True,
        timeout=300, env=os.environ | one,
    )  # fmt: skip
    assert told.returncode == -signal.SIGKILL, told.stderr
    recipe = chains.recipe(given / "source", given / "calib", drop_layers=[1], heal=REAL)
    events = []
    found = compress(recipe.model, "out", recipe, on_event=events.append)
    assert found.kept == ["compress"] and found.evaluations == {}
    assert [e.step for e in events if isinstance(e, TrainStep)] == [3, 4, 5]
    compress(recipe.model, "straight", recipe)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "recipe.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.fixture
def stopped(given, monkeypatch, tmp_path):
    """A run that was interrupted in the third step of healing; steps it and later runs did."""
    done = []

    def interrupt(step):
        if step == 2:
            raise KeyboardInterrupt

    chains.give(monkeypatch, chains.fake_distill(done, interrupt))
    notes = []
    with pytest.raises(KeyboardInterrupt):
        compress(given / "source", "out", chain(given), on_event=notes.append)
    assert notes[-1].message == (
        "kept in .out.chain: compress, heal so far; the same command goes on from there"
    )
    assert done == [0, 1]
    chains.give(monkeypatch, chains.fake_distill(done))
    return done


def notes_of(given, recipe, **more):
    told = []
    found = compress(given / "source", "out", recipe, on_event=told.append, **more)
    return found, [event.message for event in told if hasattr(event, "message")]


def test_healing_goes_on(given, stopped):
    found, _ = notes_of(given, chain(given))
    assert stopped == [0, 1, 2, 3] and found.kept == ["compress"]
    assert not Path(".out.chain").exists()
    with pytest.raises(InputError, match="out is not empty"):
        compress(given / "source", "out", chain(given))
    assert notes_of(given, chain(given), overwrite=True)[0].kept == []


def test_a_change_redoes_what_it_touches(given, stopped):
    evaluate = {"path": str(given / "heldout"), "tokens": 256, "window": 64}
    found, notes = notes_of(given, chain(given, heal=HEAL | {"steps": 3}, evaluate=evaluate))
    assert found.kept == ["compress"] and stopped == [0, 1, 0, 1, 2]
    said = "since the run was stopped, recipe.heal.steps was 4 and is 3; done anew: heal, evaluate"
    assert any(note.startswith(said) and "kept: compress" in note for note in notes), notes


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"bits": 8}, ["recipe.bits was 4 and is 8"]),
        ({"drop_layers": [2]}, ["recipe.drop_layers was [1] and is [2]"]),
        ({"drop_layers": SCORED}, ["steps were compress, heal and are drop, compress, heal"]),
    ],
)
def test_where_nothing_could_be_kept(given, stopped, fields, words):
    recipe = chain(given, **fields)
    with pytest.raises(UsageError) as caught:
        compress(given / "source", "out", recipe)
    assert all(word in str(caught.value) for word in [*words, "--restart begins anew"]), (
        caught.value
    )
    assert stopped == [0, 1] and Path(".out.chain/compress/model.safetensors").exists()
    found, _ = notes_of(given, recipe, restart=True)
    assert found.kept == [] and stopped == [0, 1, 0, 1, 2, 3]


def test_other_texts_and_another_model(given, stopped, tmp_path):
    other = chains.texts(tmp_path / "calib", languages=("en", "fr"))
    recipe = chain(given)
    moved = recipe.calibration.model_copy(update={"path": str(other)})
    with pytest.raises(UsageError, match=r"texts\.fr.* was not there and is"):
        compress(given / "source", "out", recipe.model_copy(update={"calibration": moved}))
    model = chains.shallow(tmp_path / "model", 4)
    with pytest.raises(UsageError, match=r"model\.model\.safetensors was .* and is "):
        compress(model, "out", recipe)
    # Where the same texts lie decides nothing.
    same = chains.texts(tmp_path / "same")
    moved = recipe.calibration.model_copy(update={"path": str(same)})
    found, _ = notes_of(given, recipe.model_copy(update={"calibration": moved}))
    assert found.kept == ["compress"] and stopped == [0, 1, 2, 3]


def test_bad_input_keeps_what_was_done(given, stopped):
    """A recipe that cannot run is refused before anything is thrown away."""
    Path("out").mkdir()
    Path("out/mine").write_text("not to be overwritten")
    with pytest.raises(InputError, match="out is not empty"):
        compress(given / "source", "out", chain(given), restart=True)
    shutil.rmtree("out")
    for fields in ({"skip": ["nothing"]}, {"evaluate": {"path": "nowhere"}}, {"drop_layers": [9]}):
        with pytest.raises(DistayaError):
            compress(given / "source", "out", chain(given, **fields), restart=True)
    found, _ = notes_of(given, chain(given))
    assert found.kept == ["compress"] and stopped == [0, 1, 2, 3]


def test_killed_behind_the_last_rename(given, stopped, monkeypatch):
    """The result is in place and the work folder still there: nothing is left to do."""
    with monkeypatch.context() as patch:
        patch.setattr(journal.WorkFolder, "remove", lambda self: None)
        first, _ = notes_of(given, chain(given))
    assert Path(".out.chain").exists()
    found, _ = notes_of(given, chain(given))
    assert found.kept == ["compress", "heal"] and found.steps == first.steps
    assert stopped == [0, 1, 2, 3] and not Path(".out.chain").exists()


def test_a_damaged_journal(given, stopped):
    Path(".out.chain/steps.json").write_text('{"steps": {"../x": {}}}')
    with pytest.raises(InputError, match=r"steps\.json is damaged; --restart"):
        compress(given / "source", "out", chain(given))
    found, _ = notes_of(given, chain(given), restart=True)
    assert found.kept == []


def test_fingerprints():
    one = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert fingerprint(one) == fingerprint({"d": None, "a": {"c": [1, 2], "b": 1}})
    assert difference(one, one) == "nothing"
    assert difference(one, one | {"d": "x"}) == "d was None and is 'x'"
    two = {"a": {"b": 2, "e": 0}, "d": None}
    assert difference(one, two) == (
        "a.b was 1 and is 2; a.e was not there and is 0; a.c was [1, 2] and is not there"
    )
