"""The textbook walk over a whole model, and the texts it is fed with."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import plain


@pytest.fixture(scope="module")
def model():
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CohereForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (20, 16), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_walking_the_layers_reproduces_the_model(model, ids):
    hidden, calls = plain.first_inputs(model, model.model.layers, ids)
    assert [h.shape[0] for h in hidden] == [8, 8, 4]
    for layer in model.model.layers:
        hidden = list(plain.through(layer, hidden, calls))
    logits = model.lm_head(model.model.norm(torch.cat(hidden))) * model.logit_scale
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["magnitude", "wanda", "sparsegpt"])
def test_every_linear_of_every_layer_becomes_two_of_four(model, ids, kind):
    pruned = copy.deepcopy(model)
    plain.textbook_compress(pruned, ids, plain.Method("x", kind, nm=(2, 4)))
    seen = 0
    for layer in pruned.model.layers:
        for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            kept = (linear.weight != 0).reshape(linear.out_features, -1, 4).sum(2)
            assert (kept == 2).all()
            seen += 1
    assert seen == 21
    assert torch.equal(pruned.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_later_layers_are_fitted_to_what_the_compressed_ones_give(model, ids, monkeypatch):
    """Sequential: with every Linear of layer 0 zeroed, layer 1 must see the bare embeddings."""
    seen = []

    def zero(W, hessian, method):
        seen.append(hessian.H)
        return torch.zeros_like(W)

    monkeypatch.setattr(plain, "solve", zero)
    pruned = copy.deepcopy(model)
    plain.textbook_compress(pruned, ids, plain.Method("x", "wanda", nm=(2, 4)))
    with torch.inference_mode():
        x = pruned.model.layers[1].input_layernorm(pruned.model.embed_tokens(ids)).flatten(0, 1)
    assert len(seen) == 21
    torch.testing.assert_close(seen[7], 2 / 20 * x.t() @ x, rtol=1e-4, atol=1e-4)


class Letters:
    """A tokenizer of one token per letter."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return type("Tokens", (), {"input_ids": [ord(c) for c in text]})


def test_windows_are_one_stream_cut_into_equal_pieces(tmp_path):
    (tmp_path / "aa.txt").write_text("abc\n\ndefg\n", encoding="utf-8")
    (tmp_path / "bb.jsonl").write_text('{"text": "xyz\\nuvw"}\n', encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a language")
    texts = plain.read_folder(tmp_path)
    assert texts == {"aa": ["abc", "defg"], "bb": ["xyz\nuvw"]}
    cut = plain.windows(texts["aa"], Letters(), 4)
    assert cut.flatten().tolist() == [1, *map(ord, "abc"), 2, 1, *map(ord, "de")]
    drawn = plain.balanced(texts, Letters(), 3, 4)
    assert drawn.languages == ["aa", "bb", "aa"]
    assert torch.equal(drawn.of("aa"), cut[:2])
    with pytest.raises(SystemExit, match="40 windows asked"):
        plain.balanced(texts, Letters(), 40, 4)


def test_nll_of_an_untrained_model_is_near_uniform(model, ids):
    nll, each = plain.evaluate(model, {"aa": ids[:12], "bb": ids[12:]})
    assert nll == pytest.approx((each["aa"] * 12 + each["bb"] * 8) / 20)
    assert nll == pytest.approx(torch.log(torch.tensor(64.0)).item(), rel=0.1)
