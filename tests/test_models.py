"""The architecture table against transformers' own classes, and the replay against their logits."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from distaya_ext import models
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import capture, compress
from distaya_ext.compress.proof import prove, truncated_depth
from distaya_ext.errors import InputError
from distaya_ext.models import SUPPORTED, Architecture, Stage, describe
from distaya_ext.models.architecture import PARALLEL, SEQUENTIAL
from distaya_ext.models.skeleton import build_skeleton, check_table, is_tied

CPU = torch.device("cpu")


def test_supported_families():
    assert set(SUPPORTED) == {
        "cohere",
        "cohere2",
        "llama",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "qwen2",
        "qwen3",
    }
    assert {config.model_type for config in tiny.FAMILIES.values()} == set(SUPPORTED)


def test_stages_of_both_kinds_of_block():
    assert [len(stage.names) for stage in describe({"model_type": "cohere"}).stages] == [5, 1, 1]
    assert [len(stage.names) for stage in describe({"model_type": "llama"}).stages] == [3, 1, 2, 1]


@pytest.mark.parametrize("bad", ["gpt2", "gemma3", None])
def test_unsupported_model_type_names_the_supported(bad):
    with pytest.raises(InputError, match=r"not supported.*supported are cohere, cohere2, llama"):
        describe(SimpleNamespace(model_type=bad))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_skeleton_has_no_weights_but_real_buffers(family):
    config = tiny.FAMILIES[family]
    skeleton = build_skeleton(config, torch.bfloat16)
    check_table(skeleton, describe(config))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    buffers = dict(skeleton.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())
    assert is_tied(skeleton, describe(config)) == config.tie_word_embeddings


def test_table_that_does_not_fit_is_refused():
    skeleton = build_skeleton(tiny.FAMILIES["llama"], torch.float32)
    wrong = Architecture("llama", (Stage(("self_attn.q_proj",)),))
    with pytest.raises(InputError, match="does not match the architecture table"):
        check_table(skeleton, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_replay_reproduces_the_models_own_logits(tmp_path, family, dtype):
    checkpoint = open_checkpoint(tiny.make(tmp_path, tiny.FAMILIES[family], dtype=dtype))
    ids = tiny.windows(3).ids
    for whole in (True, False):
        proof = prove(checkpoint, ids, CPU, whole=whole)
        assert proof.exact, proof
        assert proof.positions == tiny.WINDOW


def test_truncated_proof_sees_every_kind_of_layer():
    assert truncated_depth(tiny.FAMILIES["cohere2"]) == 4
    assert truncated_depth(tiny.FAMILIES["gemma3_text"]) == 3
    assert truncated_depth(tiny.FAMILIES["llama"]) == 2


@pytest.mark.parametrize("family", ["cohere2", "gemma3_text"])
def test_replay_with_the_masks_of_another_layer_is_refused(tmp_path, family, monkeypatch):
    """The fault of drivers that capture layer 0 only: here the proof must catch it."""
    checkpoint = open_checkpoint(tiny.make(tmp_path, tiny.FAMILIES[family]))
    honest = capture.Ends.inputs

    def first_layer_only(self, ids):
        hidden, calls = honest(self, ids)
        return hidden, [calls[0]] * len(calls)

    monkeypatch.setattr(capture.Ends, "inputs", first_layer_only)
    with pytest.raises(InputError, match="does not reproduce the model's own logits"):
        prove(checkpoint, tiny.windows(2).ids, CPU, whole=True)


def test_calls_differ_between_kinds_of_layers(tmp_path):
    config = tiny.FAMILIES["cohere2"]
    checkpoint = open_checkpoint(tiny.make(tmp_path, config))
    ends = capture.Ends(build_skeleton(config, torch.float32), checkpoint, CPU)
    _, calls = ends.inputs(tiny.windows(2).ids)
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert masks[0] is masks[1] is masks[2]
    assert masks[0] is not None
    assert masks[3] is None or not torch.equal(masks[3], masks[0])


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        # gate and up of a sequential block do not read what q, k and v read
        (PARALLEL, "gate_proj does not read the input of self_attn.q_proj"),
        # q cannot run after o
        ((SEQUENTIAL[1], SEQUENTIAL[0], *SEQUENTIAL[2:]), "q_proj runs before its stage"),
    ],
)
def test_wrong_table_is_noticed_while_walking(tmp_path, monkeypatch, stages, words):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    monkeypatch.setitem(models._TABLE, "llama", Architecture("llama", stages))
    with pytest.raises(InputError, match=words):
        compress(source, tmp_path / "out", tiny.recipe("wanda"), tiny.windows())
