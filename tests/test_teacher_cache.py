"""A teacher's record on disk: its bytes are those foretold, and it says what the teacher says."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.errors import InputError, ResourceError, UsageError
from distaya_ext.train import cache as caches
from distaya_ext.train.cache import Cache, Layout, fingerprint
from distaya_ext.train.losses import divergence, sparse_divergence, top
from distaya_ext.train.objective import Batch
from distaya_ext.train.teacher import Cached, Online

VOCAB = tiny.VOCAB
ROWS, LENGTH = 7, 12
K = 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tiny.make(tmp_path_factory.mktemp("teacher") / "model", tiny.FAMILIES["cohere"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(folder=folder, model=model, checkpoint=open_checkpoint(folder))


@pytest.fixture
def ids():
    return tiny.windows(ROWS, LENGTH).ids


@pytest.fixture
def small_shards(monkeypatch):
    """Three rows to a shard, so that seven make three shards."""
    monkeypatch.setattr(caches, "_SHARD_BYTES", 3 * (LENGTH - 1) * (K * 4 + 2))


def layout(teacher, ids, k=K, vocabulary=VOCAB):
    about = fingerprint(teacher.checkpoint, "float32", ids, k)
    return Layout(len(ids), ids.shape[1] - 1, k, vocabulary, about)


def written(folder, teacher, ids, k=K):
    cache = Cache(folder, layout(teacher, ids, k))
    cache.prepare(None)
    cache.write(teacher.model, ids)
    return cache


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def batch(ids, rows):
    index = torch.tensor(rows)
    return Batch(ids[index], ids[index], torch.ones(len(rows), ids.shape[1]).bool(), index)


@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_the_bytes_are_those_foretold(tmp_path, teacher, ids, k, small_shards):
    cache = written(tmp_path / "cache", teacher, ids, k)
    assert on_disk(cache.folder) == cache.layout.nbytes
    assert len(cache.layout.shards) > 1 or k == 1


@pytest.mark.parametrize(
    ("rows", "positions", "k", "vocabulary"), [(3, 7, 2, 70_000), (1, 1, 1, 9)]
)
def test_headers_are_foretold_whatever_the_sizes(tmp_path, rows, positions, k, vocabulary):
    from safetensors.torch import save_file

    sizes = Layout(rows, positions, k, vocabulary)
    held = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (dtype, shape) in sizes.tensors(rows).items()
    }
    save_file(held, tmp_path / "shard")
    assert (tmp_path / "shard").stat().st_size == sizes.shard_bytes(rows)
    assert held["ids"].dtype == (torch.int32 if vocabulary > 65536 else torch.uint16)


def test_it_holds_the_most_probable_tokens_and_what_is_left(tmp_path, teacher, ids, small_shards):
    cache = written(tmp_path / "cache", teacher, ids)
    wanted = [6, 0, 4, 0]  # out of order, over shards, one twice
    values, which, rest = cache.rows(torch.tensor(wanted))
    with torch.no_grad():
        logits = teacher.model(input_ids=ids[wanted]).logits[:, :-1]
    exact = top(logits, K)
    assert torch.equal(which, exact[1])
    assert torch.allclose(values.float(), exact[0], atol=0, rtol=2**-10)
    assert torch.allclose(rest.float(), exact[2], atol=0, rtol=2**-10)
    mass = values.double().exp().sum(-1) + rest.double().exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=5e-3)


def said(source, ids, rows, student, temperature=1.0):
    about = batch(ids, rows)
    counted = torch.ones(len(rows), LENGTH - 1, dtype=torch.bool)
    counted[:, 2] = False
    found = source.say(about, counted, ())
    here = slice(0, int(counted.sum()))
    return found.divergence(student[: here.stop], here, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_the_whole_vocabulary_says_what_the_teacher_says(
    tmp_path, teacher, ids, temperature
):
    cache = Cached(written(tmp_path / "cache", teacher, ids, VOCAB))
    student = torch.randn(99, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = [1, 5, 2]
    online = said(Online(teacher.model), ids, rows, student, temperature)
    record = said(cache, ids, rows, student, temperature)
    assert online.shape == record.shape == (3 * (LENGTH - 2),)
    # 16-bit log p: |d log p| <= 2^-11 |log p|, and the KL is an average of such.
    assert torch.allclose(record, online, rtol=0, atol=2**-10 * 20 * temperature)
    assert online.mean() > 0.1


def test_a_cache_of_few_tokens_stays_below_the_whole_kl(tmp_path, teacher, ids):
    student = torch.randn(99, VOCAB, generator=torch.Generator().manual_seed(1))
    online = said(Online(teacher.model), ids, [0, 3], student)
    before = torch.zeros_like(online)
    for k in (1, 8, 64):
        record = said(Cached(written(tmp_path / str(k), teacher, ids, k)), ids, [0, 3], student)
        assert (record <= online + 2**-7).all() and (record >= before - 2**-7).all()
        before = record
    assert before.mean() < online.mean()


def test_a_killed_run_goes_on_at_the_missing_shard(tmp_path, teacher, ids, small_shards):
    whole = written(tmp_path / "whole", teacher, ids)
    shutil.copytree(whole.folder, tmp_path / "cut")
    (tmp_path / "cut" / "rows-00001.safetensors").unlink()
    (tmp_path / "cut" / "rows-00002.safetensors.partial").write_bytes(b"half")
    os.truncate(tmp_path / "cut" / "rows-00002.safetensors", 100)
    cache = Cache(tmp_path / "cut", layout(teacher, ids))
    assert cache.missing() == [1, 2]
    cache.prepare(None)
    seen = []
    cache.write(teacher.model, ids, lambda done, rows: seen.append((done, rows)))
    assert seen == [(6, ROWS), (7, ROWS)] and cache.missing() == []
    for path in sorted(whole.folder.iterdir()):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "cut").iterdir())) == len(list(whole.folder.iterdir()))


def test_a_run_that_is_killed_while_writing_leaves_no_shard(tmp_path, teacher, ids, monkeypatch):
    def killed(held, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(caches, "save_file", killed)
    cache = Cache(tmp_path / "cache", layout(teacher, ids))
    cache.prepare(None)
    with pytest.raises(KeyboardInterrupt):
        cache.write(teacher.model, ids)
    assert cache.missing() == [0]


def test_another_teacher_text_or_k_is_refused(tmp_path, teacher, ids):
    cache = written(tmp_path / "cache", teacher, ids)
    with pytest.raises(UsageError, match="k 5 there, 6 now"):
        Cache(cache.folder, layout(teacher, ids, 6)).prepare(None)
    with pytest.raises(UsageError, match="texts"):
        Cache(cache.folder, layout(teacher, ids.flip(0))).prepare(None)
    other = open_checkpoint(tiny.make(tmp_path / "other", tiny.FAMILIES["cohere"]))
    with pytest.raises(UsageError, match=r"of another run \(teacher"):
        Cache(cache.folder, layout(SimpleNamespace(checkpoint=other), ids)).prepare(None)
    (cache.folder / "cache.json").write_text("[]")
    with pytest.raises(UsageError, match="damaged"):
        Cache(cache.folder, layout(teacher, ids)).prepare(None)


def test_the_fingerprint_does_not_move_by_itself(teacher, ids):
    first = fingerprint(teacher.checkpoint, "float32", ids, K)
    assert first == fingerprint(open_checkpoint(teacher.folder), "float32", ids.clone(), K)
    assert first != fingerprint(teacher.checkpoint, "bfloat16", ids, K)
    assert json.loads(first)["k"] == K


def test_a_budget_is_kept_before_anything_runs(tmp_path, teacher, ids):
    sizes = layout(teacher, ids)
    Cache(tmp_path / "cache", sizes).prepare(sizes.nbytes)
    limit = sizes.nbytes - 1
    with pytest.raises(ResourceError) as told:
        Cache(tmp_path / "other", sizes).prepare(limit)
    assert f"takes {sizes.nbytes} bytes, more than the {limit} allowed" in str(told.value)
    assert f"{K - 1} would fit" in str(told.value) and not (tmp_path / "other").exists()
    fitting = sizes.fitting(limit)
    assert layout(teacher, ids, fitting).nbytes <= limit < layout(teacher, ids, fitting + 1).nbytes
    with pytest.raises(ResourceError, match="not even one token a position would fit"):
        Cache(tmp_path / "other", sizes).prepare(300)


def test_a_full_disk_is_told_before_anything_runs(tmp_path, teacher, ids, monkeypatch):
    sizes = layout(teacher, ids)
    free = 1900
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ResourceError, match=f"more than the {free} free on the disk; 4 would fit"):
        Cache(tmp_path / "cache", sizes).prepare(None)


def test_what_is_written_already_needs_no_room(tmp_path, teacher, ids, monkeypatch):
    cache = written(tmp_path / "cache", teacher, ids)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500))
    cache.prepare(cache.layout.nbytes)


def test_more_tokens_than_the_vocabulary_has_are_refused():
    with pytest.raises(UsageError, match=r"98 most probable .* has 97"):
        Layout(1, 1, VOCAB + 1, VOCAB)


def test_a_teacher_that_gives_nan_is_refused(tmp_path, teacher, ids):
    spoilt = AutoModelForCausalLM.from_pretrained(teacher.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        spoilt.model.norm.weight[3] = float("nan")
    cache = Cache(tmp_path / "cache", layout(teacher, ids))
    cache.prepare(None)
    with pytest.raises(InputError, match="NaN or infinite"):
        cache.write(spoilt, ids)
    assert cache.missing() == [0]


def test_a_damaged_shard_is_told(tmp_path, teacher, ids):
    cache = written(tmp_path / "cache", teacher, ids)
    cache.path(0).write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        cache.rows(torch.tensor([0]))


def test_a_cache_has_no_hidden_states(tmp_path, teacher, ids):
    cache = Cached(written(tmp_path / "cache", teacher, ids))
    with pytest.raises(ValueError, match="no hidden states"):
        cache.say(batch(ids, [0]), torch.ones(1, LENGTH - 1).bool(), [1])


def test_rows_that_were_cut_short_match_the_cache(tmp_path, teacher, ids):
    """Batches are cut behind their longest row; the cache holds whole ones."""
    cache = Cached(written(tmp_path / "cache", teacher, ids))
    student = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(1))
    about = batch(ids[:, :6], [2, 3])
    counted = torch.ones(2, 5, dtype=torch.bool)
    got = cache.say(about, counted, ()).divergence(student[:10], slice(0, 10), 1.0)
    values, which, rest = cache.cache.rows(torch.tensor([2, 3]))
    wanted = sparse_divergence(
        values[:, :5].flatten(0, 1), which[:, :5].flatten(0, 1), rest[:, :5].flatten(), student[:10]
    )
    assert torch.equal(got, wanted)


def test_an_online_teacher_compares_common_rows_of_the_vocabulary_only(teacher, ids):
    student = torch.randn(2 * (LENGTH - 1), VOCAB + 3, generator=torch.Generator().manual_seed(1))
    counted = torch.ones(2, LENGTH - 1, dtype=torch.bool)
    found = Online(teacher.model, 90).say(batch(ids, [0, 1]), counted, [0, 2])
    got = found.divergence(student, slice(0, len(student)), 1.0)
    with torch.no_grad():
        logits = teacher.model(input_ids=ids[:2]).logits[:, :-1].flatten(0, 1)
    assert torch.allclose(got, divergence(logits[:, :90], student[:, :90]), rtol=1e-5)
    assert sorted(found.states) == [0, 2] and not found.states[2].requires_grad
