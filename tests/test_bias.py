"""Biases take up what compression changed in the mean outputs, and only where a model has some."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from distaya_ext.compress import calibrate, compress
from distaya_ext.compress.bias import Means, corrected
from distaya_ext.errors import UsageError


def weights_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_the_mean_output_is_the_one_aimed_at():
    """fp64 sums, one rounding of b' to fp32: the means agree to 1e-6 of the outputs' size."""
    make = torch.Generator().manual_seed(0)
    W, b = torch.randn(7, 12, generator=make), torch.randn(7, generator=make)
    Q = W * (torch.rand(7, 12, generator=make) < 0.5)
    x, dense = (torch.randn(50, 12, generator=make) + 1 for _ in range(2))
    each = torch.rand(50, generator=make)
    for weights in (None, each):
        share = torch.ones(50) if weights is None else weights
        share = (share / share.sum()).double()
        for wanted, outputs, mean in (
            (None, False, share @ (x.double() @ W.double().T)),
            (dense, False, share @ (dense.double() @ W.double().T)),
            (dense @ W.T, True, share @ (dense @ W.T).double()),
        ):
            means = Means(12, torch.device("cpu"))
            for part in (slice(0, 20), slice(20, 50)):
                means.add(
                    x[part],
                    None if wanted is None else wanted[part],
                    None if weights is None else weights[part],
                )
            new = corrected(b, W, Q, means, outputs=outputs)
            given = share @ (x.double() @ Q.double().T) + new.double()
            torch.testing.assert_close(given, mean + b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quality", ["plain", "default"])
@pytest.mark.parametrize("family", ["qwen2", "llama-bias"])
def test_only_biases_change_before_the_next_stage_sees_them(tmp_path, monkeypatch, family, quality):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family])
    found = {}
    for on in (False, True):
        recipe = tiny.recipe(nm="2:4", quality=quality, bias_correction=on)
        compress(source, tmp_path / str(on), recipe, tiny.windows())
        found[on] = weights_of(tmp_path / str(on))
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(found[True][f"{first}.weight"], found[False][f"{first}.weight"])
    biases = [name for name in found[True] if name.endswith("_proj.bias")]
    assert biases
    before = weights_of(source)
    for name in biases:
        assert torch.equal(found[False][name], before[name])
        assert not torch.equal(found[True][name], before[name])


def test_without_biases_no_bit_changes(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"])
    for on in (False, True):
        compress(source, tmp_path / str(on), tiny.recipe(bias_correction=on), tiny.windows())
    a, b = weights_of(tmp_path / "False"), weights_of(tmp_path / "True")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_texts_it_is_refused():
    with pytest.raises(UsageError, match="bias_correction needs the means of inputs"):
        tiny.recipe("magnitude", bias_correction=True)
