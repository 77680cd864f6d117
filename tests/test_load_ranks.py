"""A model in memory of every rank, its folder read once by all of them together."""

import json

import pytest
import torch
from loud import config
from packed_folders import edit_tensors, w4, write
from ranked import Ranks, run_ranks
from speaking import tokenizer
from tiny import make

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.evaluate import load
from distaya_ext.ranks import reading, team


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense ones (with a head of its own and biases, tied, with old generation settings) and one
    packed, embedding too.
    """
    root = tmp_path_factory.mktemp("models")
    found = {
        name: make(root / name, config(family, 2, vocab_size=300), dtype=dtype)
        for name, family, dtype in [
            ("biased", "llama-bias", torch.bfloat16),
            ("tied", "gemma2", torch.float32),
            ("old", "cohere2", torch.bfloat16),
        ]
    }
    (found["old"] / "generation_config.json").unlink()
    told = json.loads((found["old"] / "config.json").read_text())
    told["repetition_penalty"] = 1.5
    (found["old"] / "config.json").write_text(json.dumps(told))
    for name, source, method in [
        ("ours", "tied", "distaya"),
        ("stock", "biased", "pack-quantized"),
    ]:
        more = {"embed_bits": 8} if method == "distaya" else {}
        found[name], _ = write(found[source], root / name, w4(), method=method, **more)
    for folder in found.values():
        tokenizer().save_pretrained(folder)
    return found


def _loaded(folders, together):
    """Of each model: every tensor, what it does, how it generates; bytes read by this rank."""
    reading.WHOLE = 1 << 8  # tensors are shared out as those of real models are
    found = {}
    for name, folder in folders.items():
        before = team().read
        model = load(folder, together=together).model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        bits = {
            key: (str(t.dtype), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            for key, t in tensors.items()
        }
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 20)[None]).logits.float().numpy().tobytes()
        settings = model.generation_config.to_dict()
        kept = (model.name_or_path, model.config.to_dict(), model.training, len(bits))
        found[name] = (bits, logits, settings, kept), team().read - before
    return found


def test_every_rank_has_the_model_and_each_byte_is_read_once(folders):
    (expected,) = run_ranks(1, _loaded, folders, False)
    ranks = run_ranks(2, _loaded, folders, True)
    for name, folder in folders.items():
        want, _ = expected[name]
        assert want[0] and (name != "old" or want[2]["repetition_penalty"] == 1.5)
        for found in ranks:
            for one, other in zip(found[name][0], want, strict=True):
                assert one == other, name
        bytes_read = [found[name][1] for found in ranks]
        assert sum(bytes_read) == open_checkpoint(folder, packed=True).nbytes
        assert max(bytes_read) < 0.7 * sum(bytes_read)


def test_a_weight_that_is_not_finite_is_told_of_by_the_rank_that_reads_it(folders, tmp_path):
    folder = make(tmp_path / "bad", config("llama-bias", 2, vocab_size=300))
    tokenizer().save_pretrained(folder)

    def spoil(tensors):
        tensors["model.embed_tokens.weight"][3] = float("nan")

    edit_tensors(folder, spoil)
    ends = Ranks(2, _loaded, {"bad": folder}, True).ends()
    assert {what[0] for _, what in ends} == {"InputError", "LostError"}
    (told,) = [what[1] for _, what in ends if what[0] == "InputError"]
    assert told == "weight model.embed_tokens.weight holds NaN or infinity, first in row 3 of 300"
