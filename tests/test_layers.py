"""Scores of layers against literal formulas and models of transformers that really lack them."""

import weakref

import loud
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import Calibration
from distaya_ext.errors import InputError, UsageError
from distaya_ext.influence import head as head_module
from distaya_ext.influence import walk as walk_module
from distaya_ext.influence.choose import Study, choose, how_many, score_layers
from distaya_ext.influence.events import Measured
from distaya_ext.influence.scores import Languages
from distaya_ext.influence.spec import DropSpec
from distaya_ext.models.depth import irregular

WINDOWS = tiny.windows(6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a loud model by family, made when asked for."""
    root, made = tmp_path_factory.mktemp("loud"), {}

    def folder(family, **more):
        key = (family, *sorted(more.items()))
        if key not in made:
            made[key] = tiny.make(root / str(len(made)), loud.config(family, **more))
        return made[key]

    return folder


def same(a, b, rtol=2e-4, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# ---- against brute force ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_removal_is_that_of_a_model_that_lacks_the_layer(folders, family):
    """The KL of the walk is that of whole logits, scale, cap and kinds of attention included."""
    folder = folders(family)
    found = score_layers(open_checkpoint(folder), WINDOWS, ["ppl", "kl"])
    dense = loud.log_probabilities(loud.without(folder), WINDOWS.ids)
    assert [str(who) for who in found.candidates] == [f"layer {i}" for i in range(4)]
    for i in range(4):
        other = loud.log_probabilities(loud.without(folder, [i]), WINDOWS.ids)
        kl, dnll = loud.losses(dense, other, WINDOWS.ids)
        same(found.tables["kl"][i], loud.per_language(kl, WINDOWS.languages))
        same(found.tables["ppl"][i], loud.per_language(dnll, WINDOWS.languages))
    assert found.tables["kl"].min() > 1e-3  # or nothing was shown
    assert found.languages.names == ("en", "fr") and found.languages.windows == {"en": 3, "fr": 3}


@pytest.mark.parametrize("family", ["cohere", "cohere2", "llama-bias", "gemma2", "qwen3"])
def test_similarity_by_the_letter(folders, family):
    folder = folders(family)
    found = score_layers(open_checkpoint(folder), WINDOWS, ["bi", "angular", "l2"], run=2)
    h = loud.states(loud.without(folder), WINDOWS.ids)

    def angle(x, y):
        cos = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        return cos.clamp(-1, 1).arccos() / torch.pi

    for i in range(4):
        x, y = h[i], h[i + 1]
        bi = 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        l2 = (y - x).norm(dim=-1) / x.norm(dim=-1)
        for name, value in (("bi", bi), ("angular", angle(x, y)), ("l2", l2)):
            by = loud.per_language(value.mean(1).numpy(), WINDOWS.languages)
            same(found.tables[name][i], by)
        last = loud.per_language(angle(x, y)[:, -1].numpy(), WINDOWS.languages)
        same(found.tables["angular last"][i], last)
    assert found.firsts == (0, 1, 2) and "kl" not in found.tables and found.nll is None
    for first in found.firsts:
        run = angle(h[first], h[first + 2])
        same(found.runs[first], loud.per_language(run.mean(1).numpy(), WINDOWS.languages))
        same(found.runs_last[first], loud.per_language(run[:, -1].numpy(), WINDOWS.languages))


@pytest.mark.parametrize("family", ["cohere", "cohere2", "llama", "gemma2", "gemma3_text"])
def test_attention_and_mlp_by_themselves(folders, family):
    """A block that adds nothing is one whose last Linear is zero, parallel or not."""
    folder = folders(family)
    found = score_layers(open_checkpoint(folder), WINDOWS, ["bi", "kl"], parts=True)
    dense = loud.without(folder)
    p, h = loud.log_probabilities(dense, WINDOWS.ids), loud.states(dense, WINDOWS.ids)
    rows = {str(who): i for i, who in enumerate(found.candidates)}
    assert len(rows) == 12 and list(rows)[3:6] == ["layer 3", "attention 0", "MLP 0"]
    for kind, name in (("attention", "self_attn.o_proj"), ("MLP", "mlp.down_proj")):
        for layer in (0, 2):
            other = loud.without(folder, silent=(layer, name))
            kl, _ = loud.losses(p, loud.log_probabilities(other, WINDOWS.ids), WINDOWS.ids)
            at = rows[f"{kind} {layer}"]
            same(found.tables["kl"][at], loud.per_language(kl, WINDOWS.languages))
            rest = loud.states(other, WINDOWS.ids)[layer + 1]
            bi = 1 - torch.cosine_similarity(rest, h[layer + 1], dim=-1).mean(1)
            same(found.tables["bi"][at], loud.per_language(bi.numpy(), WINDOWS.languages))
    if family.startswith("cohere"):  # out = h + attention + MLP: each alone leaves the other
        layer = dense.model.layers[0]
        with torch.no_grad():
            mlp = layer.mlp(layer.input_layernorm(h[0].float())).double()
        bi = 1 - torch.cosine_similarity(h[0] + mlp, h[1], dim=-1).mean(1)
        at = rows["attention 0"]
        same(found.tables["bi"][at], loud.per_language(bi.numpy(), WINDOWS.languages))


@pytest.mark.parametrize("score", ["kl", "ppl"])
@pytest.mark.parametrize("family", ["cohere2", "llama"])
def test_greedy_rounds_are_those_of_brute_force(folders, family, score):
    folder = folders(family, layers=6)
    choice = choose(open_checkpoint(folder), WINDOWS, DropSpec(count=3, score=score))
    dense = loud.log_probabilities(loud.without(folder), WINDOWS.ids)
    gone: list[int] = []
    for one in choice.rounds:
        cost = {}
        for layer in sorted(set(range(6)) - set(gone)):
            other = loud.log_probabilities(loud.without(folder, [*gone, layer]), WINDOWS.ids)
            kl, dnll = loud.losses(dense, other, WINDOWS.ids)
            values = loud.per_language(kl if score == "kl" else dnll, WINDOWS.languages)
            cost[layer] = values.mean()
        best = min(cost, key=cost.get)
        assert one.went == (best,)
        assert [who.layer for who in one.scores.candidates] == list(cost)
        same(one.scores.mean(score), list(cost.values()))
        gone.append(best)
    assert choice.dropped == sorted(gone) and len(gone) == 3
    final = choice.loss.kl if score == "kl" else choice.loss.dnll
    same(final.mean(), cost[best])
    assert choice.to_dict()["rounds"] == [[layer] for layer in gone]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("score", ["kl", "ppl", "bi", "angular", "l2"])
def test_exactly_count_layers_go(folders, score, count):
    """DistAya took one layer more than it was told."""
    checkpoint = open_checkpoint(folders("qwen2"))
    choice = choose(checkpoint, WINDOWS, DropSpec(count=count, score=score, greedy=False))
    assert len(choice.dropped) == count == len(set(choice.dropped)) and len(choice.rounds) == 1
    assert checkpoint.without(choice.dropped).config.num_hidden_layers == 4 - count
    found = choice.scores
    if score == "angular" and count > 1:
        assert np.diff(choice.dropped).tolist() == [1] * (count - 1)
        mean = found.runs.mean(axis=1)
        assert choice.dropped[0] == found.firsts[int(mean.argmin())]
    else:
        assert choice.dropped == sorted(np.argsort(found.mean(score), kind="stable")[:count])


# ---- languages, protection, ties ----


def test_each_language_is_measured_for_itself(folders):
    """Languages of unequal size: what one is given is what it has alone, and the mean is theirs."""
    checkpoint = open_checkpoint(folders("cohere"))
    ids = tiny.windows(7).ids
    languages = ["fr", "en", "ja", "en", "en", "ja", "en"]
    both = score_layers(checkpoint, Calibration(ids, languages), run=2)
    assert both.languages.windows == {"en": 4, "fr": 1, "ja": 2}
    for at, name in enumerate(both.languages.names):
        rows = [i for i, lang in enumerate(languages) if lang == name]
        alone = score_layers(checkpoint, Calibration(ids[rows], [name] * len(rows)), run=2)
        for score, table in both.tables.items():
            same(table[:, at], alone.tables[score][:, 0], rtol=1e-5, atol=1e-7)
        same(both.runs[:, at], alone.runs[:, 0], rtol=1e-5)
        same(both.nll[at], alone.nll[0], rtol=1e-6)
    same(both.mean("kl"), both.tables["kl"].mean(axis=1))
    lang, value = both.worst("kl", 1)
    assert (
        value
        == both.tables["kl"][1].max()
        == both.tables["kl"][1][both.languages.names.index(lang)]
    )


def test_sums_become_means():
    languages = Languages(["b", "a", "b"], 4)
    assert languages.names == ("a", "b")
    assert languages.mean(np.array([6.0, 3.0, 12.0]), 3).tolist() == [1.0, 3.0]


def test_protected_layers_stay(folders):
    checkpoint = open_checkpoint(folders("llama", layers=6))
    free = choose(checkpoint, WINDOWS, DropSpec(count=2, score="angular")).dropped
    keep = [free[0], -1]
    for score in ("kl", "bi", "angular"):
        spec = DropSpec(count=2, score=score, protect=keep)
        dropped = choose(checkpoint, WINDOWS, spec).dropped
        assert len(dropped) == 2 and not {free[0], 5} & set(dropped)


def test_of_equal_layers_the_first_goes(folders, tmp_path):
    """Layers 1, 2 and 3 do nothing: every score of theirs is 0."""
    source = folders("cohere", layers=5)
    tensors = load_file(source / "model.safetensors")
    for i in (1, 2, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{i}.{name}.weight"].zero_()
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_bytes((source / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path / "model")
    for score in ("kl", "ppl", "bi", "angular", "l2"):
        choice = choose(checkpoint, WINDOWS, DropSpec(count=2, score=score))
        assert choice.dropped == [1, 2] and choice.scores.mean(score)[1] == 0.0, score
        assert choice.loss.kl.max() == 0.0
    assert choice.scores.ranking("l2")[:3] == [1, 2, 3]


@pytest.mark.parametrize(
    "share, depth, count", [(0.25, 8, 2), (0.25, 7, 1), (0.29, 100, 29), (0.5, 3, 1), (0.99, 2, 1)]
)
def test_shares_round_down(share, depth, count):
    assert how_many(DropSpec(share=share), depth)[0] == count


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"count": 4}, ["4 layers", "has 4"]),
        ({"count": 9}, ["9 layers", "has 4"]),
        ({"share": 0.2}, ["20% of 4 layers is less than one"]),
        ({"count": 1, "protect": [4]}, ["layer 4", "has 4, from 0 to 3", "-4 to -1"]),
        ({"count": 1, "protect": [-5]}, ["layer -5", "has 4"]),
        ({"count": 3, "protect": [0, -4, -1]}, ["3 layers", "2 are protected", "only 2 may go"]),
        ({"count": 2, "protect": [1, 3], "score": "angular"}, ["no 2 consecutive", "2 of 4"]),
    ],
)
def test_layers_that_cannot_be_chosen(folders, fields, words):
    with pytest.raises(UsageError) as caught:
        choose(open_checkpoint(folders("llama")), WINDOWS, DropSpec(**fields))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_what_cannot_be_scored(folders, tmp_path):
    checkpoint = open_checkpoint(folders("llama"))
    with pytest.raises(UsageError, match="'taylor' is none of kl, ppl"):
        score_layers(checkpoint, WINDOWS, ["taylor"])
    with pytest.raises(UsageError, match="no score is asked for"):
        score_layers(checkpoint, WINDOWS, [])
    with pytest.raises(UsageError, match=r"run of 5 layers .* has 4"):
        score_layers(checkpoint, WINDOWS, run=5)
    with pytest.raises(InputError, match="use token 97"):
        score_layers(checkpoint, Calibration(WINDOWS.ids + 1 + 96 - WINDOWS.ids.max(), ["en"] * 6))
    with pytest.raises(UsageError, match="'tpu' is unknown"):
        score_layers(checkpoint, WINDOWS, device="tpu")
    tensors = load_file(folders("llama") / "model.safetensors")
    (tmp_path / "hot").mkdir()
    tensors["model.layers.2.mlp.down_proj.weight"].mul_(3e38)
    save_file(tensors, tmp_path / "hot" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "hot" / "config.json").write_bytes((folders("llama") / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"(layer 2 is not finite|holds NaN or infinity)"):
        score_layers(open_checkpoint(tmp_path / "hot"), WINDOWS)


def test_a_head_that_is_not_understood_is_refused(folders, monkeypatch):
    """Were the family's scale of logits not seen, nothing would be measured."""

    class Blind(head_module.Head):
        def __init__(self, ends):
            super().__init__(ends)
            self.scale = 1.0

    monkeypatch.setattr(walk_module, "Head", Blind)
    with pytest.raises(InputError, match="scale 1 and cap None: they differ by"):
        score_layers(open_checkpoint(folders("cohere")), WINDOWS)


# ---- how it runs ----


def test_the_same_bits_whatever_the_machine(folders, threads, monkeypatch, tmp_path):
    """Twice, with 1 or 2 threads, in memory or spilled to files that are gone afterwards."""
    checkpoint = open_checkpoint(folders("cohere2"))

    def bits(**more):
        study = Study(checkpoint, WINDOWS, run=2, parts=True)
        specs = [DropSpec(count=2), DropSpec(count=2, score="angular")]
        scores, choices = study.go(specs, **more)
        tables = [*scores.tables.values(), scores.runs, *(c.loss.kl for c in choices)]
        return [choice.dropped for choice in choices], [table.tobytes() for table in tables]

    first = bits()
    torch.set_num_threads(1)
    assert bits() == first
    monkeypatch.setattr(walk_module.Budget, "spills", lambda self, count: count > 0)
    assert bits(scratch=tmp_path) == first
    assert list(tmp_path.iterdir()) == []


def test_one_layer_at_a_time_each_read_once(folders, monkeypatch):
    """A walk reads every layer once, and none while another one is alive."""
    alive, reads, load = [], [], walk_module.load_layer

    def watched(layer, prefix, checkpoint, device, **more):
        assert not any(ref() for ref in alive)
        found = load(layer, prefix, checkpoint, device, **more)
        alive.append(weakref.ref(found))
        reads.append(int(prefix.rpartition(".")[2]))
        return found

    monkeypatch.setattr(walk_module, "load_layer", watched)
    told: list[Measured] = []
    choice = choose(
        open_checkpoint(folders("gemma2", layers=5)), WINDOWS, DropSpec(count=2),
        on_event=told.append,
    )  # fmt: skip
    gone = choice.rounds[0].went[0]
    left = [i for i in range(5) if i != gone]
    assert reads == [0, 1, 2, 3, 4, *left, *(i for i in left if i not in choice.dropped)]
    # 5 + 4 + ... forwards, then the head of the model itself and of each candidate
    ends = [event for event in told if event.done == event.total]
    assert [event.total for event in ends] == [15 + 6, 10 + 5, 3 + 1]
    assert "round 2 of 2" in ends[1].what


# ---- kinds of attention ----


@pytest.mark.parametrize(
    "layers, period, dropped, words",
    [
        (8, 4, (0, 5), ["6 layers that stay 2 have it (at 3, 6)", "gives 1", "divides by 4"]),
        (8, 4, (4, 5, 6, 7), None),
        (8, 4, (0, 1, 2, 3), None),
        (8, 4, (6, 7), ["6 layers that stay 1", "(at 4)"]),
        (6, 2, (0, 1), None),
        (6, 2, (1,), ["5 layers that stay 2 have it (at 3, 5)", "gives 2"]),
        (4, 4, (3,), None),
    ],
)
def test_patterns_that_become_irregular_are_told(layers, period, dropped, words):
    config = loud.config("cohere2", layers=layers)
    config.layer_types = [loud.KINDS[i % period == period - 1] for i in range(layers)]
    left = [i for i in range(layers) if i not in dropped]
    found = irregular(config, left)
    if words is None or dropped == (6, 7):
        assert found is None  # sliding, sliding, sliding, full, sliding, sliding is still the rule
    else:
        assert all(word in found for word in words), found
    config.layer_types = ["full_attention"] * layers
    assert irregular(config, left) is None


def test_a_choice_tells_of_its_pattern(folders):
    checkpoint = open_checkpoint(folders("cohere2", layers=8))
    choice = choose(checkpoint, WINDOWS, DropSpec(count=1, score="bi", protect=[4, 5, 6, 7]))
    assert choice.dropped[0] < 4 and len(choice.notices) == 1
    assert "llama.cpp" in choice.notices[0] and "divides by 4" in choice.notices[0]
