"""Distilling and fine-tuning by several ranks, from folders to a folder."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import ranked
import speaking
import teaching
import torch
from ranked import run_ranks
from transformers import AutoModelForCausalLM

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.errors import InputError
from distaya_ext.ranks import team
from distaya_ext.tokenizer import load_tokenizer
from distaya_ext.train import cache as caches
from distaya_ext.train import plot, sequence
from distaya_ext.train.cache import Cache, Layout, fingerprint
from distaya_ext.train.distill import distill
from distaya_ext.train.finetune import finetune
from distaya_ext.train.sequence import write

ranked._context.set_forkserver_preload(
    ["torch.distributed", "transformers.trainer", "distaya_ext.train.distill", "peft"]
)
SHORT = {"steps": 3, "evaluate_every": 2, "warmup": 0.0, "batch_tokens": 6 * teaching.WINDOW}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A teacher, a student of half its depth and another width, and texts."""
    root = tmp_path_factory.mktemp("models")
    teaching.save(root / "teacher")
    teaching.save(root / "student", 1, num_hidden_layers=2, hidden_size=24)
    speaking.save_texts(root / "texts", repeat=20)
    return root


def _weights(out: Path) -> dict[str, str]:
    files = sorted(out.rglob("*.safetensors"))
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _plots_nothing() -> None:
    def nothing(_: Path, folder: Path) -> list[Path]:
        for name in ("loss.png", "loss.svg"):
            (folder / name).touch()
        return []

    plot.plot_losses = nothing


def _taught(root: Path, parts: int | None) -> dict[str, Any]:
    """Files, records and what was said of a distillation and of a fine-tuning."""
    _plots_nothing()
    out, said, found = root / f"by {team().world}", [], {}
    ways = {
        "online": {"loss": {"kl": 1.0, "cosine": 1.0}, "train": "lora"},
        "cached": {"loss": {"kl": 1.0, "cache": 8}, "train": "full"},
    }
    for name, fields in ways.items():
        asked = teaching.spec(fields.pop("loss"), **SHORT, **fields, parts=parts)
        places = root / "teacher", root / "student", out / name
        found[name] = distill(*places, root / "texts", asked, on_event=said.append)
    asked = teaching.spec(**SHORT, train="full", parts=parts)
    found["tuned"] = finetune(
        root / "student", out / "tuned", root / "texts", asked, on_event=said.append
    )
    team().wait()
    return {
        name: {
            "files": _weights(out / name),
            "record": {k: v for k, v in done.record.items() if k in ("before", "after", "texts")},
            "merged": done.merged.summary(),
            "left": [path.name for path in out.glob(".*")],
            "ranks": done.course.ranks,
        }
        for name, done in found.items()
    } | {"said": len(said)}


def test_a_folder_is_the_same_whatever_number_of_ranks_made_it(root):
    (one,) = run_ranks(1, _taught, root, 2)
    for rank, found in enumerate(run_ranks(2, _taught, root, None)):
        assert bool(found.pop("said")) == (rank == 0)
        for name, each in found.items():
            assert each.pop("ranks") == 2 and not each["left"]
            assert each == {k: v for k, v in one[name].items() if k != "ranks"}
    before, after = (one["cached"]["record"][when]["all"]["kl"] for when in ("before", "after"))
    assert after < before


def _sharded(root: Path, shard: str) -> dict[str, torch.Tensor]:
    _plots_nothing()
    out = root / f"{shard} {team().world}"
    loss = {"kl": 1.0, "mse": 0.1, "ce": 1.0}
    asked = teaching.spec(loss, **SHORT, train="full", shard=shard, learning_rate=2e-3)
    done = distill(root / "teacher", root / "student", out, root / "texts", asked)
    team().wait()
    tensors = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    return {
        "state": {name: tensor.numpy() for name, tensor in tensors.items()},
        "after": done.record["after"]["all"],
        "replaced": done.merged.replaced,
        "best": done.course.best_step,
        "read": team().read,
    }


def test_a_sharded_student_is_published_whole(root):
    whole, found = (run_ranks(2, _sharded, root, how) for how in ("none", "full"))
    assert found[0]["replaced"] == found[1]["replaced"] == whole[0]["replaced"]
    assert found[0]["after"] == found[1]["after"]
    # Teacher and student are read once between the ranks.
    models = [root / name / "model.safetensors" for name in ("teacher", "student")]
    assert 0 < sum(one["read"] for one in found) <= sum(path.stat().st_size for path in models)
    assert found[0]["best"] == whole[0]["best"] > 0
    assert found[0]["after"] == pytest.approx(whole[0]["after"], rel=1e-4)
    start = teaching.load(root / "student").state_dict()
    ends = [
        {n: torch.from_numpy(v) for n, v in one["state"].items()} for one in (found[0], whole[0])
    ]
    off = sum(float((ends[0][n] - ends[1][n]).square().sum()) for n in start)
    way = sum(float((start[n] - ends[1][n]).square().sum()) for n in start)
    assert 0 < off < 1e-4 * way  # Cohere's weights are stored as float32 here


def _recorded(root: Path, folder: str) -> tuple[list[int], dict[str, str], str]:
    """Rows this rank wrote, the files, and what it says of a folder that it does not see."""
    ids = torch.randint(3, 300, (11, 12), generator=torch.Generator().manual_seed(3))
    caches._SHARD_BYTES = 2 * 11 * (4 * 5 + 2)  # two rows
    teacher = open_checkpoint(root / "teacher")
    about = fingerprint(teacher, "float32", ids, 5)
    cache, rows = Cache(root / folder, Layout(11, 11, 5, 300, about)), []
    if team().first:
        cache.prepare(None)
    team().wait()
    missing = team().tell(cache.missing())
    cache.write(teaching.load(root / "teacher"), ids, lambda done, _: rows.append(done), missing)
    team().wait()
    cache.check()
    try:
        Cache(root / "elsewhere", cache.layout).check()
    except InputError as error:
        return rows, _weights(cache.folder), str(error)
    raise AssertionError("a rank read what is not there")


def test_ranks_write_the_teachers_record_together(root):
    ((rows, files, _),) = run_ranks(1, _recorded, root, "one")
    assert rows == [2, 4, 6, 8, 10, 11]
    found = run_ranks(2, _recorded, root, "two")
    assert [each[0] for each in found] == [[2, 6, 10], [4, 8, 11]]
    for rank, each in enumerate(found):
        assert each[1] == files
        assert each[2].startswith(f"rank {rank} does not see {root}") and "5 others" in each[2]


def _written(root: Path, name: str) -> tuple[list[Any], bytes]:
    sequence.BATCH = 3
    tokenizer = load_tokenizer(root / "teacher", 300)
    asked = teaching.spec(tokens=12 * teaching.WINDOW)
    model = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32)
    texts, cache = root / "texts", root / name
    found = write(model, tokenizer, texts, asked, cache, temperature=0.7)
    team().wait()
    return found, cache.read_bytes()


def test_ranks_share_the_prompts_a_teacher_continues(root):
    ((one, text),) = run_ranks(1, _written, root, "one.jsonl")
    assert len(one) == 12
    lines = text.splitlines(keepends=True)
    (root / "two.jsonl").write_bytes(b"".join(lines[:5]))  # goes on behind one batch
    for found in run_ranks(2, _written, root, "two.jsonl"):
        assert found == (one, text)
