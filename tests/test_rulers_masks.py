"""The rulers of masks: the published ones, weight by weight against loops over their definitions,
and exchanges between groups."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, VOCAB
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import plain, refined, textbook
from distaya_ext.ops import dass as dass_op

PATTERNS = ({"sparsity": 0.5}, {"sparsity": 0.3}, {"nm": (2, 4)}, {"nm": (4, 8)})


@pytest.fixture
def W() -> torch.Tensor:
    return torch.randn(16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def norms() -> torch.Tensor:
    return torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.1


def least(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: scores[i])[:count])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dass_drops_outputs_of_one_input(W, pattern):
    """Along the rows of every column: each |w| times the neuron's norm to the power of a half."""
    inner = torch.rand(16, generator=torch.Generator().manual_seed(2)) + 0.1
    mask = textbook.dass(W, inner, **pattern)
    n, m = pattern.get("nm", (None, 16))
    drop = m - n if n else int(16 * pattern["sparsity"])
    for j in range(24):
        for start in range(0, 16, m):
            scores = [abs(float(W[i, j])) * float(inner[i]) ** 0.5 for i in range(start, start + m)]
            lost = {i - start for i in range(start, start + m) if not mask[i, j]}
            assert lost == least(scores, drop)


@pytest.mark.parametrize("pattern", PATTERNS[2:], ids=str)
def test_ria_weighs_by_row_and_column(W, norms, pattern):
    mask = textbook.ria(W, norms, **pattern)
    n, m = pattern["nm"]
    A = W.double().abs()
    for i in range(16):
        for start in range(0, 24, m):
            scores = [
                float((A[i, j] / A[i].sum() + A[i, j] / A[:, j].sum()) * norms[j] ** 0.5)
                for j in range(start, start + m)
            ]
            lost = {j - start for j in range(start, start + m) if not mask[i, j]}
            assert lost == least(scores, m - n)


def test_ria_keeps_half_of_the_matrix_and_survives_zeros(W, norms):
    W[3], W[:, 5] = 0, 0
    mask = textbook.ria(W, norms, sparsity=0.5)
    assert int((~mask).sum()) == 16 * 24 // 2 + 1  # as the published code counts
    assert not mask[3].any() and not mask[:, 5].any()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()


def test_dass_of_a_model(model):
    """Attention stays; gate and up of layer 0 follow the inputs of its down, N:M by outputs."""
    ids = torch.randint(3, VOCAB, (6, 24), generator=torch.Generator().manual_seed(3))
    pruned = copy.deepcopy(model)
    plain.textbook_compress(pruned, ids, plain.Method("", "dass", nm=(2, 4), mlp_only=True))
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    inner = torch.cat(seen).norm(dim=0)
    before, after = model.model.layers[0], pruned.model.layers[0]
    assert torch.equal(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
    for name in ("gate_proj", "up_proj"):
        old, new = (layer.mlp.get_submodule(name).weight for layer in (before, after))
        mask = textbook.dass(old, inner, nm=(2, 4))
        assert ((new != 0) == mask).float().mean() > 0.999  # the sums run in another order
        assert (new.reshape(-1, 4, new.shape[1]) != 0).sum(1).eq(2).all()
    down = after.mlp.down_proj.weight
    assert (down.reshape(len(down), -1, 4) != 0).sum(2).eq(2).all()


@pytest.mark.parametrize("items", [8, 16, 72, 304], ids="{} neurons".format)  # odd numbers, too
@pytest.mark.parametrize("nm", [(1, 2), (2, 4), (3, 4), (4, 8)], ids="{0[0]}:{0[1]}".format)
def test_a_round_of_exchanges_is_that_of_ours(nm, items):
    make = torch.Generator().manual_seed(items)
    scores = torch.rand(items, 45, generator=make) * torch.rand(items, 1, generator=make)
    order = torch.randperm(items, generator=make)
    ours = order.clone()
    dass_op.dass_balance_(ours, scores, *nm, 1)
    assert torch.equal(refined.balance_round(scores, order, *nm, step=3), ours)
    assert items < 304 or not torch.equal(ours, order)
