"""What reconstruction leaves alone, and how languages count in it."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_reconstruct import Case

from distaya_ext.compress import at_work, compress


def test_stacks_of_lower_quality_are_frozen(tmp_path):
    case, plain = Case(tmp_path / "a"), Case(tmp_path / "b", quality="plain")
    frozen = case.stacks[-1]
    frozen.settings = plain.stacks[-1].settings
    before = case.weights()
    assert case.train()
    for stack in case.stacks:
        for name in stack.names:
            same = torch.equal(case.weights()[name], before[name])
            assert same == (stack is frozen), name
    before = plain.weights()
    assert plain.train() == {}
    assert all(torch.equal(W, before[name]) for name, W in plain.weights().items())


def test_groups_of_an_activation_order_are_frozen(tmp_path):
    """They have codes but no grid, so no scale to train."""
    case = Case(tmp_path, plan="int3")
    stack = case.stacks[1]
    stack.grids.clear()
    before = case.weights()
    assert case.train()
    for name, W in case.weights().items():
        assert torch.equal(W, before[name]) == (name in stack.names)


def test_norms_and_biases_are_left_alone(tmp_path):
    case = Case(tmp_path, "llama-bias")
    rest = {k: v.clone() for k, v in case.layer.named_parameters() if not k.endswith("proj.weight")}
    assert any("bias" in k for k in rest) and any("norm" in k for k in rest)
    case.train()
    assert all(torch.equal(v, case.layer.get_parameter(k)) for k, v in rest.items())


def test_weights_of_languages_change_what_is_trained(tmp_path):
    """A language that counts nothing leaves no trace; figures are those of the weighted error."""
    both = Case(tmp_path / "both", windows=64, per_chunk=32)
    one, spoilt = (
        Case(tmp_path / name, windows=64, per_chunk=32, weights={"en": 1.0, "fr": 0.0})
        for name in ("one", "spoilt")
    )
    first = 0
    for chunk, size in enumerate(map(len, spoilt.course.calibration.chunks())):
        y = spoilt.targets.get(("hidden", chunk)).clone()
        french = [spoilt.languages[first + at] == "fr" for at in range(size)]
        y[torch.tensor(french)] *= 7
        spoilt.targets.put(("hidden", chunk), y)
        first += size
    before = one.error()
    told = [case.train() for case in (both, one, spoilt)]
    assert float(told[1]["before"]) == pytest.approx(before, rel=1e-4)
    assert float(told[1]["after"]) == pytest.approx(one.error(), rel=1e-4)
    assert float(told[0]["before"]) != float(told[1]["before"])
    a, b, c = (case.weights() for case in (both, one, spoilt))
    assert all(torch.equal(b[name], c[name]) for name in b)
    assert all(not torch.equal(a[name], b[name]) for name in a)


def test_rules_of_a_run(tmp_path, monkeypatch):
    """In compress(): skipped and dense Linears keep their bits, and the layer error never rises."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"])
    told, train = [], at_work.reconstruct

    def noted(layer, stacks, course):
        told.append((train(layer, stacks, course), {n for s in stacks for n in s.names}))
        return told[-1][0]

    monkeypatch.setattr(at_work, "reconstruct", noted)
    recipe = tiny.recipe(
        nm="2:4",
        quality="high",
        skip=["v_proj$"],
        modules=[{"match": "o_proj$", "dense": True}],
    )
    compress(source, tmp_path / "out", recipe, tiny.windows())
    assert len(told) == 2
    for figures, names in told:
        assert figures["after"] <= figures["before"]
        assert not any(name.endswith(("v_proj", "o_proj")) for name in names)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "out"))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {n for n in before if n.endswith(("v_proj.weight", "o_proj.weight"))} <= kept
    for name in set(before) - kept:
        groups = after[name].view(len(after[name]), -1, 4)
        assert int((groups != 0).sum(2).max()) <= 2


@pytest.mark.parametrize("batch", [1, 4])
def test_languages_count_between_batches_too(tmp_path, batch):
    """A batch of one language alone is weighed against the others; weight 0 does no harm."""
    cases = [
        Case(tmp_path / str(french), weights={"en": 1.0, "fr": french}, batch=batch)
        for french in (0.0, 0.25, 1.0)
    ]
    told = [case.train() for case in cases]
    assert all(0 < float(t["after"]) < float(t["before"]) for t in told)
    a, b, c = (case.weights() for case in cases)
    assert all(not torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(b[name], c[name]) for name in b)
