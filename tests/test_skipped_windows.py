"""Calibration windows on which a model overflows: left out, counted, and refused when too many."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distaya_ext.compress import Calibration, compress
from distaya_ext.compress.reconstruct import Course
from distaya_ext.errors import InputError, NumericsError

HOT = 5  # the one token whose embedding is beyond float32's squares


def hot_model(folder, family="cohere", **fields):
    """A model that is healthy but for one token, which only the windows that hold it notice."""
    config = type(tiny.FAMILIES[family])(
        **{**tiny.FAMILIES[family].to_dict(), "tie_word_embeddings": False, **fields}
    )
    source = tiny.make(folder, config)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][HOT] = 3e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def calibration(count, bad):
    """Windows without the hot token, but for those numbered."""
    found = tiny.windows(count)
    found.ids[found.ids == HOT] = HOT + 1
    for number in bad:
        found.ids[number, 3] = HOT
    return found


def without(found, bad):
    keep = [i for i in range(len(found.languages)) if i not in bad]
    return Calibration(found.ids[keep], [found.languages[i] for i in keep])


def weights(folder):
    return load_file(folder / "model.safetensors")


RECIPES = {
    "plain": {"quality": "plain"},
    "default": {"quality": "default"},
    "high": {"quality": "high"},
    "gptq": {"method": "gptq", "bits": 4, "group": 32, "quality": "default"},
    "wanda": {"method": "wanda"},
    "equal": {"quality": "default", "calibration": {"weights": "equal"}},
    "worst": {"quality": "default", "calibration": {"weights": "worst"}},
}


@pytest.mark.parametrize("key", ["plain", "default", "gptq", "wanda", "equal", "worst"])
def test_a_window_that_overflows_leaves_no_trace(tmp_path, key):
    """The weights are those of a run that was never given the window."""
    source = hot_model(tmp_path / "source")
    recipe = tiny.recipe(**RECIPES[key])
    found = calibration(16, [9])
    report = compress(source, tmp_path / "a", recipe, found)
    compress(source, tmp_path / "b", recipe, without(found, [9]))
    (skipped,) = [e for e in report.fallbacks.found if e.kind == "skipped_windows"]
    assert skipped.module == "model.layers.0.self_attn.q_proj" and skipped.degraded
    assert skipped.what == "its input is not finite for window 5 of 8 in language 'fr'"
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.is_floating_point() and key not in ("equal", "worst"):
            # chunks hold other windows, so sums round otherwise
            assert (tensor != theirs[name]).float().mean() < 0.02, name
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), name
    told = json.loads((tmp_path / "a" / "results.json").read_text())["fallbacks"]
    assert told["kinds"] == {"skipped_windows": 1}


def test_training_does_not_see_the_window(tmp_path):
    source = hot_model(tmp_path / "source")
    report = compress(
        source, tmp_path / "out", tiny.recipe(**RECIPES["high"]), calibration(16, [7])
    )  # window 7 is one that would be held out
    assert all(v["after"] <= v["before"] < 1 for v in report.trained.values())
    assert len(report.trained) == 2
    assert all(bool(t.isfinite().all()) for t in weights(tmp_path / "out").values())


@pytest.mark.parametrize("quality", ["plain", "default", "high"])
def test_overflow_inside_a_layer_is_found_there(tmp_path, quality):
    """float16 and a neuron that only the hot token drives: down_proj would get infinity."""
    config = tiny.FAMILIES["llama"]
    source = tiny.make(tmp_path / "source", config, dtype=torch.float16)
    tensors = load_file(source / "model.safetensors")
    embed, layer = tensors["model.embed_tokens.weight"], "model.layers.0"
    embed[:, 7] = 0
    embed[HOT, 7] = 8.0
    tensors[f"{layer}.self_attn.o_proj.weight"][7] = 0  # attention passes nothing of it on
    for name in ("gate_proj", "up_proj"):
        tensors[f"{layer}.mlp.{name}.weight"][:, 7] = 300.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found, recipe = calibration(16, [15]), tiny.recipe(quality=quality)
    report = compress(source, tmp_path / "out", recipe, found)
    (skipped,) = [e for e in report.fallbacks.found if e.kind == "skipped_windows"]
    assert skipped.module == f"{layer}.mlp.down_proj"
    assert skipped.what == "its input is not finite for window 8 of 8 in language 'fr'"
    assert all(bool(t.isfinite().all()) for t in weights(tmp_path / "out").values())
    assert all(m.loss < 1e4 for m in report.modules)


def test_more_than_may_be_left_out_end_the_run(tmp_path):
    source = hot_model(tmp_path / "source")
    words = (
        r"^the input of model\.layers\.0\.self_attn\.q_proj is not finite for window 4 of 8 in "
        r"language 'en': the model overflows in its dtype on 2 of 16 calibration windows, more "
        r"than the 1 that may be left out$"
    )
    with pytest.raises(InputError, match=words):
        compress(source, tmp_path / "out", tiny.recipe(), calibration(16, [6, 9]))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_language_is_never_lost_in_silence(tmp_path):
    source = hot_model(tmp_path / "source")
    found = calibration(16, [9])
    found = Calibration(found.ids, ["sw" if i == 9 else "en" for i in range(16)])
    with pytest.raises(InputError, match=r"window 1 of 1 in language 'sw'.*none is left of sw"):
        compress(source, tmp_path / "out", tiny.recipe(), found)


def test_strict_ends_the_run_at_the_first(tmp_path):
    source = hot_model(tmp_path / "source")
    with pytest.raises(NumericsError, match=r"skipped_windows in 1.*window 5 of 8 in language"):
        compress(source, tmp_path / "out", tiny.recipe(), calibration(16, [9]), strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_spilled_activations_are_left_out_too(tmp_path, monkeypatch):
    from distaya_ext.compress.budget import Budget

    source, found = hot_model(tmp_path / "source"), calibration(16, [9])
    recipe = tiny.recipe(quality="default")
    compress(source, tmp_path / "a", recipe, found)
    monkeypatch.setattr(Budget, "spills", lambda self, waiting: True)
    report = compress(source, tmp_path / "b", recipe, found)
    assert report.spilled and any("activations wait on disk" in n for n in report.notices)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_batches_hold_no_window_that_is_left_out():
    windows = Calibration(torch.zeros(16, 4), ["en"] * 16, chunk_tokens=8 * 4)
    course = Course(None, 2, None, None, windows, None, left_out=(3, 15))
    for held in (True, False):
        rows = {8 * chunk + int(row) for chunk, part in course.places(0, held, 0) for row in part}
        every = {n for n in range(16) if (n % 8 == 7) is held}
        assert rows == every - {3, 15}
