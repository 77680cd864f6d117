"""What a run takes of a GPU's memory, from shapes alone, and what happens where there is less."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import CohereConfig

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.checkpoint.entry import Entry
from distaya_ext.compress import budget, calibrate, compress, driver, ferry
from distaya_ext.compress.store import Store
from distaya_ext.errors import ResourceError
from distaya_ext.formats import late
from distaya_ext.measure.shapes import MODELS
from distaya_ext.models import describe

TOKENS = 128 * 2048


@pytest.fixture
def aya():
    """As much of a checkpoint of Aya-8B's shape as the estimates ask for."""
    m = MODELS["aya-8b"]
    config = CohereConfig(
        hidden_size=m.hidden, intermediate_size=m.ff, vocab_size=m.vocab, num_hidden_layers=32
    )
    shapes = {
        "self_attn.q_proj": (m.hidden, m.hidden),
        "self_attn.k_proj": (m.kv, m.hidden),
        "self_attn.v_proj": (m.kv, m.hidden),
        "self_attn.o_proj": (m.hidden, m.hidden),
        "mlp.gate_proj": (m.ff, m.hidden),
        "mlp.up_proj": (m.ff, m.hidden),
        "mlp.down_proj": (m.hidden, m.ff),
    }
    entries = {"model.embed_tokens.weight": Entry(None, (m.vocab, m.hidden), torch.bfloat16)}
    for name, shape in shapes.items():
        entries[f"model.layers.0.{name}.weight"] = Entry(None, shape, torch.bfloat16)
    return SimpleNamespace(
        config=config, architecture=describe(config), dtype=torch.bfloat16, entries=entries
    )


def test_what_waits_is_hidden_states_one_output_and_one_input(aya):
    """4096 of the layer's input and of the attention's output, 14336 of down_proj's input."""
    assert budget.waiting_per_token(aya) == 4096 + 4096 + 14336
    assert budget.activation_bytes(aya, TOKENS) == 2 * TOKENS * 22528


def test_aya_8b_with_its_tokens_fits_into_20_gb(aya):
    needed = budget.device_bytes(aya, TOKENS)
    assert 15e9 < needed <= 20e9
    # Nothing of the sum may be forgotten: weights, the largest Hessian, what waits.
    weights = sum(e.nbytes for n, e in aya.entries.items() if "layers" in n)
    assert needed > 2 * weights + 4 * 14336**2 + budget.activation_bytes(aya, TOKENS)
    assert budget.device_bytes(aya, 0) == needed - budget.activation_bytes(aya, TOKENS)


def test_a_smaller_gpu_keeps_activations_on_the_host_and_a_tiny_one_is_refused(aya, monkeypatch):
    cuda = torch.device("cuda")

    def waits(free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
        return budget.waits_on_host(aya, TOKENS, cuda)

    everything, least = budget.device_bytes(aya, TOKENS), budget.device_bytes(aya, 0)
    assert not waits(everything)
    assert waits(everything - 1) and waits(least)
    with pytest.raises(ResourceError, match=r"takes at least \d+\.\d GiB of GPU memory and \d"):
        waits(least - 1)


@pytest.mark.parametrize("quality", ["plain", "default", "high"])
def test_a_run_stays_below_the_estimate(tmp_path, monkeypatch, quality):
    """Aya-8B's proportions, 16 times narrower: every byte that torch holds while layers run as on a
    GPU, beside the estimate without what a GPU needs besides.
    """
    monkeypatch.setattr(ferry, "runs_late", lambda device: True)
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 1024)
    monkeypatch.setattr(budget, "CUDA_CHUNK_TOKENS", 1024)
    monkeypatch.setattr(late, "_BLOCK", 1 << 16)
    sizes = {"hidden_size": 256, "intermediate_size": 896, "vocab_size": 400}
    config = CohereConfig(
        **sizes, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    source = tiny.make(tmp_path / "source", config, dtype=torch.bfloat16)
    tokens = tiny.windows(128, 128, 400)
    recipe = tiny.recipe("sparsegpt", nm="2:4", bits=4, format="distaya", quality=quality)
    needs = budget.Needs(twin=quality != "plain", trains=quality == "high")
    with torch.profiler.profile(profile_memory=True) as profile:
        compress(source, tmp_path / "out", recipe, tokens)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    told = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    seen = max(e["args"]["Total Allocated"] for e in told if e.get("name") == "[memory]")
    checkpoint = open_checkpoint(source)
    estimate = budget.device_bytes(checkpoint, tokens.tokens, needs) - budget._CONTEXT
    print(f"held {seen / 2**20:.1f} MiB, estimated {estimate / 2**20:.1f} MiB")
    assert 0.5 * estimate < seen <= estimate


def test_activations_on_the_host_change_no_bit(tmp_path, monkeypatch):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"])
    stores = []

    def away(run, scratch):
        stores.append(Store(host=True))
        return stores[-1]

    compress(source, tmp_path / "here", tiny.recipe("wanda"), tiny.windows())
    monkeypatch.setattr(driver._Run, "_store", away)
    compress(source, tmp_path / "away", tiny.recipe("wanda"), tiny.windows())
    assert len(stores) == 2
    name = "model.safetensors"
    assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "away" / name).read_bytes()
