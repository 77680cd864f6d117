"""Weights of languages: what they sum to, what they change, and what follows the losses."""

import json

import pytest
import tiny
import torch

from distaya_ext.compress import Calibration, compress, events
from distaya_ext.compress.languages import (
    LEAST,
    MOST,
    STRENGTH,
    Inputs,
    Mixture,
    bounded,
    compared,
    raised,
)
from distaya_ext.compress.statistic import Statistic
from distaya_ext.errors import InputError

LENGTH = 8


def calibration(languages: str, length: int = LENGTH) -> Calibration:
    """Windows of random tokens in languages such as "en en sw"."""
    names = languages.split()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, tiny.VOCAB, (len(names), length), generator=generator)
    return Calibration(ids, names, chunk_tokens=2 * length)


def activations(count: int, columns: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(count, LENGTH, columns, generator=generator)


def statistic(mixture: Mixture, x: torch.Tensor, kind: str = "hessian") -> Statistic:
    found = Statistic(kind, x.shape[-1], torch.device("cpu"))
    for chunk, part in enumerate(x.split(2)):
        found.add(part.flatten(0, 1), weights=mixture.gather("a", chunk, part))
    return found


def moment(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1).double()
    return flat.t() @ flat / len(flat)


# ---- what weights mean ----


def test_equal_gives_every_language_the_same_sum():
    mixture = Mixture(calibration("en en en sw ja ja"), "equal")
    sums = dict.fromkeys(mixture.languages, 0.0)
    for chunk in range(3):
        weights = mixture.of_tokens(chunk).view(2, LENGTH).sum(dim=1).tolist()
        for at, weight in zip(mixture.places(chunk), weights, strict=True):
            sums[mixture.languages[at]] += weight
    assert list(sums.values()) == pytest.approx([16.0, 16.0, 16.0])  # 48 tokens in all


def test_equal_mixes_the_second_moments_of_languages():
    x = activations(6)
    mixture = Mixture(calibration("en en en sw ja ja"), "equal")
    expected = (moment(x[:3]) + moment(x[3:4]) + moment(x[4:])) / 3
    torch.testing.assert_close(
        statistic(mixture, x).matrix().double(), expected, rtol=2e-6, atol=1e-6
    )
    norms = statistic(mixture, x, "norms").norms().double()
    torch.testing.assert_close(norms, expected.diagonal().sqrt(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("weights", ["equal", {"en": 1.0}, {"en": 3.0, "sw": 3.0}])
def test_equal_quotas_need_no_weights(weights):
    mixture = Mixture(calibration("en sw en sw"), weights)
    assert all(mixture.of_tokens(chunk) is None for chunk in range(2))
    assert torch.equal(mixture.shares, torch.full((2,), 0.5, dtype=torch.float64))


def test_user_weights_are_repeated_tokens():
    """Weight 3 of a language is the same as its windows given three times."""
    x = activations(4)
    weighted = statistic(Mixture(calibration("en sw en sw"), {"sw": 3}), x)
    again = torch.cat([x, x[[1, 3]], x[[1, 3]]])
    names = "en sw en sw sw sw sw sw"
    repeated = statistic(Mixture(calibration(names), "proportional"), again)
    torch.testing.assert_close(weighted.matrix(), repeated.matrix(), rtol=2e-6, atol=1e-7)


def test_weight_zero_leaves_a_language_out_whatever_it_holds():
    x = activations(4)
    x[1] = torch.inf
    found = statistic(Mixture(calibration("en sw en ja"), {"sw": 0}), x).matrix()
    alone = statistic(Mixture(calibration("en en ja"), "proportional"), x[[0, 2, 3]]).matrix()
    torch.testing.assert_close(found, alone, rtol=2e-6, atol=1e-7)


def test_weights_that_cannot_be():
    some = calibration("en sw")
    with pytest.raises(InputError, match=r"weight for ja, xx, but .* in en, sw"):
        Mixture(some, {"xx": 1.0, "en": 1.0, "ja": 2.0})
    with pytest.raises(InputError, match="weight 0: en 1, sw 1 windows"):
        Mixture(some, {"en": 0.0, "sw": 0.0})


def test_norms_of_each_language_and_how_alike_they_are():
    x = activations(4)
    mixture = Mixture(calibration("en sw en sw"), "proportional")
    statistic(mixture, x)
    expected = torch.stack([moment(x[0::2]).diagonal(), moment(x[1::2]).diagonal()])
    torch.testing.assert_close(mixture.norms("a").double(), expected.sqrt(), rtol=2e-6, atol=0)
    rms, likeness = mixture.close_layer().inputs["a"]
    torch.testing.assert_close(rms, expected.mean(dim=1).sqrt(), rtol=2e-6, atol=0)
    assert (likeness > 0.5).all() and (likeness < 1).all()
    same = Inputs(mixture, 12, "cpu")
    same.add(0, x[[0, 0]])
    same.add(1, x[[0, 0]])
    torch.testing.assert_close(same.summary()[1], torch.ones(2, dtype=torch.float64))


# ---- worst ----


def test_shares_follow_the_losses_within_bounds():
    errors = torch.tensor([1.0, 1.0, 1.2, 1.0], dtype=torch.float64)
    found = raised(compared(errors))
    assert found.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert found[2] > 0.25 > found[0] and found[0] == found[1] == found[3]
    assert (found[2] / found[0]).item() == pytest.approx(1.2**STRENGTH, rel=1e-9)
    found = raised(compared(torch.tensor([1.0, 1.0, 9e9, 0.0], dtype=torch.float64)))
    assert found.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert found.min() >= LEAST / 4 - 1e-12 and found.max() <= MOST / 4 + 1e-12
    assert found[2] == found.max() and found[3] == found.min()


def test_no_loss_at_all_changes_no_share():
    found = raised(compared(torch.zeros(2, dtype=torch.float64)))
    torch.testing.assert_close(found, torch.full((2,), 0.5, dtype=torch.float64))


def test_shares_follow_the_mean_of_the_layers():
    """Two layers that disagree cancel out; the order of layers does not matter."""
    dense = activations(2)
    mixture = Mixture(calibration("en sw"), "worst")
    for worse in (0, 1):
        change = torch.full((2, 1, 1), 0.1)
        change[worse] = 0.12
        mixture.observe(0, dense * (1 + change), dense)
        mixture.close_layer()
        if worse == 0:
            assert mixture.shares[0] > 0.5
    torch.testing.assert_close(mixture.shares, torch.full((2,), 0.5, dtype=torch.float64))


def test_bounded_shares_keep_their_proportions_inside():
    shares = torch.tensor([0.7, 0.2, 0.06, 0.04], dtype=torch.float64)
    found = bounded(shares, 0.125, 0.5)
    assert found.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert found[0] == 0.5 and found[3] == 0.125 and 0.125 <= found[2] < found[1]


def test_errors_are_those_of_each_language():
    dense = activations(4)
    change = torch.tensor([0.1, 0.2, 0.1, 0.2])[:, None, None]
    mixture = Mixture(calibration("en sw en sw"), "worst")
    before = dense.clone()
    for chunk in range(2):
        part = slice(2 * chunk, 2 * chunk + 2)
        mixture.observe(chunk, dense[part] * (1 + change[part]), dense[part])
    assert torch.equal(dense, before)
    account = mixture.close_layer()
    expected = torch.tensor([0.01, 0.04], dtype=torch.float64)
    torch.testing.assert_close(account.errors, expected, rtol=1e-5, atol=0)
    assert account.shares.tolist() == [0.5, 0.5]
    assert mixture.shares[1] > 0.5  # the next layer's
    assert mixture.close_layer().errors is None  # nothing was noted of it


# ---- whole runs ----


def run(folder, name, languages, method="sparsegpt", **fields):
    source = folder / "source"
    if not source.is_dir():
        tiny.make(source, tiny.FAMILIES["cohere"])
    weights = fields.pop("weights", "proportional")
    recipe = tiny.recipe(method, calibration={"weights": weights}, quality="plain", **fields)
    seen = []
    given = calibration(languages, tiny.WINDOW)
    report = compress(source, folder / name, recipe, given, on_event=seen.append)
    return report, (folder / name / "model.safetensors").read_bytes(), seen


EVEN = "en sw " * 4
UNEVEN = "en en en sw " * 2


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_equal_is_proportional_for_equal_quotas_bit_for_bit(tmp_path, method):
    plain = run(tmp_path, "a", EVEN, method)
    equal = run(tmp_path, "b", EVEN, method, weights="equal")
    assert plain[1] == equal[1]
    uneven = run(tmp_path, "c", UNEVEN, method)
    weighted = run(tmp_path, "d", UNEVEN, method, weights="equal")
    assert uneven[1] != weighted[1]
    same = run(tmp_path, "e", UNEVEN, method, weights={"sw": 3.0})
    shares = [found[0].languages.summary()["sw"]["share"] for found in (weighted, same)]
    assert shares[0] == pytest.approx([0.5, 0.5])
    assert shares[1] == pytest.approx([0.5, 0.5])


def test_worst_is_deterministic_and_told(tmp_path):
    report, first, seen = run(tmp_path, "a", UNEVEN, weights="worst")
    assert run(tmp_path, "b", UNEVEN, weights="worst")[1] == first
    assert run(tmp_path, "c", UNEVEN, weights="equal")[1] != first
    told = [event for event in seen if isinstance(event, events.LanguagesDone)]
    assert [event.layer for event in told] == [0, 1]
    assert told[0].shares == pytest.approx({"en": 0.5, "sw": 0.5})
    worse = max(told[0].errors, key=told[0].errors.get)
    assert told[1].shares[worse] > 0.5
    results = json.loads((tmp_path / "a" / "results.json").read_text())["calibration"]
    assert results["weights"] == "worst"
    english = results["languages"]["en"]
    assert english["windows"] == 6 and english["tokens"] == 6 * tiny.WINDOW
    assert english["share"] == pytest.approx([event.shares["en"] for event in told], abs=1e-6)
    assert english["error"] == pytest.approx([event.errors["en"] for event in told], rel=1e-5)
    lines = (tmp_path / "a" / "languages.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 * 2  # layers, stages, languages
    assert lines[0].startswith("layer,stage,language,share,error,")
    assert report.languages.rows[0][1] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_worst_in_every_family(tmp_path, family):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family])
    recipe = tiny.recipe(nm="2:4", calibration={"weights": "worst"}, quality="plain")
    report = compress(source, tmp_path / "out", recipe, tiny.windows())
    assert report.sparsity == 0.5
    for facts in report.languages.summary().values():
        assert len(facts["share"]) == len(facts["error"]) == tiny.FAMILIES[family].num_hidden_layers
        assert all(0 < error < 1 for error in facts["error"])
