"""Which hidden states are compared, how they are taken, and the projector between two widths."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from distaya_ext.errors import UsageError
from distaya_ext.train.hidden import captured, pairs, projector, source_layers


def test_last_is_the_outputs_of_the_last_layers():
    assert pairs("last", 6, 8) == [(6, 8)]


@pytest.mark.parametrize(
    ("depth", "teacher", "wanted"),
    [
        (3, 3, [(1, 1), (2, 2), (3, 3)]),
        (2, 8, [(1, 4), (2, 8)]),
        (3, 8, [(1, 3), (2, 5), (3, 8)]),
        (6, 3, [(2, 1), (4, 2), (6, 3)]),  # a deeper, narrower student
    ],
)
def test_all_spreads_the_shallower_model_over_the_other(depth, teacher, wanted):
    assert pairs("all", depth, teacher) == wanted


def test_layers_that_stayed_are_compared_with_those_they_came_from():
    assert pairs("all", 4, 6, (0, 1, 4, 5)) == [(1, 1), (2, 2), (3, 5), (4, 6)]
    # The teacher's last layer is gone: what goes into the head is still to be its output.
    assert pairs("all", 3, 5, (0, 2, 3)) == [(1, 1), (2, 3), (3, 5)]


def test_pairs_are_taken_as_given():
    assert pairs([(0, 0), (2, 5)], 2, 5) == [(0, 0), (2, 5)]


def test_absent_layers_are_named_with_both_depths():
    with pytest.raises(UsageError, match=r"7:1, 1:9 .* student has 6 layers.* teacher 8"):
        pairs([(1, 1), (7, 1), (1, 9)], 6, 8)
    with pytest.raises(UsageError, match="-1:0"):
        pairs([(-1, 0)], 6, 8)
    with pytest.raises(UsageError, match=r"1:2 .* named twice"):
        pairs([(1, 2), (1, 2)], 6, 8)
    with pytest.raises(UsageError, match="empty"):
        pairs([], 6, 8)


@pytest.mark.parametrize(
    ("dropped", "wanted"),
    [([3, 4], (0, 1, 2, 5)), ([], None), ([3], None), ([3, 9], None), (["3", 4], None)],
)
def test_source_layers_are_read_where_they_fit(tmp_path, dropped, wanted):
    (tmp_path / "results.json").write_text(json.dumps({"dropped_layers": dropped}))
    assert source_layers(tmp_path, 4, 6) == wanted
    (tmp_path / "results.json").rename(tmp_path / "training.json")
    assert source_layers(tmp_path, 4, 6) == wanted


def test_folders_of_others_have_no_source_layers(tmp_path):
    assert source_layers(tmp_path, 4, 6) is None
    (tmp_path / "results.json").write_text("[1, 2]")
    assert source_layers(tmp_path, 4, 6) is None


@pytest.mark.parametrize(("width", "teacher"), [(5, 9), (9, 5)])
def test_the_projector_keeps_lengths_where_it_can_and_is_seeded(width, teacher):
    first, again, other = (projector(width, teacher, seed) for seed in (3, 3, 4))
    W = first.linear.weight.detach().double()
    assert W.shape == (teacher, width) and first.linear.bias is None
    gram = W.T @ W if teacher > width else W @ W.T
    assert torch.allclose(gram, torch.eye(5, dtype=torch.float64), atol=1e-6)
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert first(torch.randn(2, 3, width).bfloat16()).shape == (2, 3, teacher)


def test_equal_widths_need_no_projector():
    assert projector(64, 64) is None


@pytest.mark.parametrize("family", ["cohere", "cohere2", "gemma2", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_states_are_those_of_transformers(family, checkpointing):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny.FAMILIES[family], dtype=torch.float32)
    depth = model.config.num_hidden_layers
    ids = tiny.windows(2).ids
    wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with captured(model, range(depth + 1)) as found:
        last = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert sorted(found) == list(range(depth + 1))
    for index in range(depth):
        assert torch.equal(found[index], wanted[index]), index
    assert torch.equal(model.model.norm(found[depth]), last)
    weight = model.model.layers[0].mlp.down_proj.weight
    found[depth].square().sum().backward()
    assert weight.grad.abs().max() > 0
    assert sorted(found) == list(range(depth + 1))  # the recomputation left nothing new behind
