"""A step of decoding on packed weights can be captured as a CUDA graph: nothing in it waits."""

import packed_folders
import pytest
import syncs
import tiny
import torch

from distaya_ext.formats import ModuleScheme
from distaya_ext.measure import model as bench
from distaya_ext.measure.decode import StaticDecode, fits
from distaya_ext.runtime import load

FAMILIES = ["cohere", "cohere2", "llama-bias", "gemma", "gemma3_text", "qwen3"]
PROMPT, NEW = 6, 5


def packed(tmp_path, family, dtype="float32", pattern="2:4", device="cpu"):
    config = tiny.FAMILIES[family]
    if getattr(config, "sliding_window", None):  # room for all positions of these tests
        config = type(config)(**{**config.to_dict(), "sliding_window": 32})
    source = tiny.make(tmp_path / "dense", config)
    scheme = ModuleScheme(4, 32, True, kind="int4-2:4" if pattern else None)
    folder, _ = packed_folders.write(
        source, tmp_path / "packed", scheme, method="distaya", pattern=pattern, embed_bits=8
    )
    return load(folder, dtype=dtype, exact=True, device=device)


def ids(device="cpu"):
    make = torch.Generator().manual_seed(1)
    return torch.randint(3, tiny.VOCAB, (1, PROMPT), generator=make).to(device)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_waits_and_gives_what_generate_gives(tmp_path, family):
    model = packed(tmp_path, family)
    assert fits(model, PROMPT + NEW)
    with torch.inference_mode():
        decode = StaticDecode(model, ids(), NEW)
        places = [t.data_ptr() for t in (decode.token, decode.position, decode.logits)]
        with syncs.Recorder() as recorder:
            for _ in range(NEW):
                decode.step()
        assert recorder.found == []
        assert places == [t.data_ptr() for t in (decode.token, decode.position, decode.logits)]
        out = model.generate(
            ids(), max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert decode.token.item() == out[0, -1].item()
        again = decode.logits.clone()
        assert torch.equal(decode.run(NEW), out[:, -1:])  # from the start, to the same end
        assert torch.equal(decode.logits, again)


def test_a_planted_read_is_found(tmp_path, monkeypatch):
    model = packed(tmp_path, "cohere")
    layer = model.model.layers[0].self_attn.q_proj
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x) * float(x.isfinite().all()))
    with torch.inference_mode():
        decode = StaticDecode(model, ids(), NEW)
        with syncs.Recorder() as recorder:
            decode.step()
    assert "__float__" in recorder.found


def test_a_window_that_fills_up_cannot_be_one_graph(tmp_path):
    sliding = load(tiny.make(tmp_path / "a", tiny.FAMILIES["cohere2"]))  # a window of 8
    assert fits(sliding, 8) and not fits(sliding, 9)
    assert fits(load(tiny.make(tmp_path / "b", tiny.FAMILIES["qwen2"])), 1000)


@pytest.mark.cuda
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("family", ["cohere", "gemma"])
def test_a_captured_step_equals_the_eager_one(tmp_path, family, pattern):
    model = packed(tmp_path, family, "bfloat16", pattern, "cuda")
    with torch.inference_mode():
        decode = StaticDecode(model, ids("cuda"), NEW)
        eager = []
        for _ in range(NEW):
            decode.step()
            eager.append((decode.token.clone(), decode.logits.clone()))
        decode.rewind()
        decode.capture()
        for token, logits in eager:
            decode.graph.replay()
            assert torch.equal(decode.token, token) and torch.equal(decode.logits, logits)
        assert torch.equal(decode.run(NEW), eager[-1][0])


@pytest.mark.cuda
def test_bench_model_measures_the_graph(tmp_path):
    model = packed(tmp_path, "cohere", "bfloat16", "2:4", "cuda")
    result = bench.compare({"ours": model}, bench.Setting(PROMPT, NEW, runs=1, device="cuda"))
    assert result.rows[0].graph_rate > 0
