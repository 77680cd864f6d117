"""distaya search under ranks: what is dealt out to whom, and the bits of one process."""

from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from ranked import Ranks, run_ranks
from speaking import save_model, save_texts
from tiny import FAMILIES, VOCAB, WINDOW, make
from typer.testing import CliRunner

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import Calibration
from distaya_ext.ranks import least_loaded, team
from distaya_ext.recipe import CalibrationSpec
from distaya_ext.search import Options, prepare, run, search, sensitivity, variants, whole
from distaya_ext.search.deal import Dealt

# ---- who does what ----


def test_jobs_go_to_the_rank_with_least_to_do() -> None:
    assert least_loaded([1, 9, 4, 4], 1) == [0, 0, 0, 0]
    assert least_loaded([1, 9, 4, 4], 2) == [1, 0, 1, 1]
    assert least_loaded([5, 5], 4) == [0, 1]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 40])
@pytest.mark.parametrize(("variants", "count", "chunk"), [(63, 23, 1), (5, 7, 3), (1, 4, 4)])
def test_every_measurement_is_dealt_out_once(
    world: int, variants: int, count: int, chunk: int
) -> None:
    dealt, chunks = Dealt(variants, count, chunk, world), -(-count // chunk)
    every = [(v, c) for v in range(variants) for c in range(chunks)]
    of = [[(v, c) for c in range(chunks) for v in dealt.of_rank(r, c)] for r in range(world)]
    assert sorted(chain(*of)) == every
    assert all((v, c) in of[dealt.rank_of(v, c)] for v, c in every)
    for rank, own in enumerate(of):
        assert dealt.needs(rank) == sorted({v for v, _ in own})
        windows = sum(min(chunk, count - c * chunk) for _, c in own)
        assert abs(windows - variants * count / world) <= chunk


# ---- the bits of one process ----


def _windows(count: int, seed: int = 3) -> Calibration:
    ids = torch.randint(3, VOCAB, (count, WINDOW), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, [("en", "fr")[i % 2] for i in range(count)])


def _bits(tensor: torch.Tensor) -> int:
    return crc32(tensor.numpy().tobytes())


def _searched(
    folder: Path, asked: dict[str, Any], count: int, chunk: int, spills: bool
) -> dict[str, Any]:
    """A search, and what this rank has seen of it."""
    whole.CHUNK_BYTES = chunk * 4 * VOCAB * WINDOW  # so many windows at a time
    sensitivity.CHUNK_TOKENS = 2 * WINDOW
    told: list[tuple[int, int, str]] = []
    tables: list[np.ndarray] = []
    factors: list[tuple[int, int]] = []
    swept: list[tuple[str, str, int]] = []
    gathered, cholesky, put = Dealt.gathered, variants.cholesky, variants.Variants.put

    def gather(self: Dealt, own: np.ndarray) -> np.ndarray:
        tables.append(gathered(self, own).copy())
        return own

    def factorise(H: torch.Tensor, *args: Any, **more: Any) -> Any:
        made = cholesky(H, *args, **more)
        factors.append((len(H), _bits(made.R)))
        return made

    def keep(self: variants.Variants, name: str, choice: Any, grid: Any) -> None:
        swept.append((name, choice.name, _bits(grid.codes)))
        put(self, name, choice, grid)

    Dealt.gathered, variants.cholesky, variants.Variants.put = gather, factorise, keep
    if spills:
        run.plan_memory = lambda *_: prepare.Memory(True, True)
    parts = asked.pop("parts", None)
    # No other rank's texts count.
    texts = _windows(count) if team().first else _windows(count + 2, 100)
    found = search(
        folder,
        texts,
        Options(
            **asked,
            group=32,
            quality="plain",
            calibration=CalibrationSpec(tokens=16 * WINDOW, window=WINDOW, parts=parts),
        ),
        on_progress=lambda *step: told.append(step),
    )
    return {
        "found": found,
        "tables": tables,
        "factors": factors,
        "swept": swept,
        "told": told,
        "read": team().read,
    }


def _same(ranks: list[dict[str, Any]], one: dict[str, Any], names: int) -> None:
    """Every rank found what one process finds: KLs to the bit, and all that follows from them.
    names: of a variant, at most.
    """
    for each in ranks:
        assert len(each["tables"]) == len(one["tables"])
        for a, b in zip(each["tables"], one["tables"], strict=True):
            assert a.tobytes() == b.tobytes()
        assert each["found"] == ranks[0]["found"]
        ours, theirs = each["found"].to_dict(), one["found"].to_dict()
        for told in (ours, theirs):
            assert told.pop("cost")["variants"] == each["found"].cost["variants"]
            told["recipe"]["calibration"].pop("parts")
        assert ours == theirs
    assert sorted(chain(*(each["factors"] for each in ranks))) == sorted(one["factors"])
    every = list(chain(*(each["swept"] for each in ranks)))
    assert set(every) == set(one["swept"])
    layers = len({name.split(".")[2] for name, *_ in every})
    # A variant that two ranks measure is made by both; there are fewer of them than ranks.
    assert len(every) <= len(one["swept"]) + (len(ranks) - 1) * layers * names
    assert all(len(each["swept"]) < len(one["swept"]) for each in ranks)
    assert [bool(each["told"]) for each in ranks] == [r == 0 for r in range(len(ranks))]
    for steps in (ranks[0]["told"], one["told"]):
        counts = [done for done, _, what in steps if what.startswith("layer")]
        assert counts == sorted(set(counts))
        assert counts[-1] == one["found"].cost["variants"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "llama"
    return make(folder, FAMILIES["llama"], dtype=torch.bfloat16)


WIDE = {
    "choices": "bf16,int4,mask-50+int4",
    "search_tokens": 16 * WINDOW,
    "bits_per_weight": 5.0,
    "drop": True,
    "polish": 2,
    "parts": 3,
}


def test_ranks_find_what_one_process_finds(llama: Path) -> None:
    """Chunks of four windows and of two, three parts of 4, 5 and 5 Hessian windows."""
    arguments = (llama, WIDE, 26, 4, False)
    one = run_ranks(1, _searched, *arguments)[0]
    assert one["read"] == 0 and one["found"].rows[0].objective > 0
    for world in (2, 3):
        found = run_ranks(world, _searched, *arguments)
        _same(found, one, 1)
        assert all(each["factors"] for each in found)
        assert sum(each["read"] for each in found) == open_checkpoint(llama).nbytes
    # Another number of parts is another order of the sums: what is compared here could differ.
    other = run_ranks(1, _searched, llama, WIDE | {"parts": 1}, 26, 4, False)[0]
    assert not set(one["factors"]) & set(other["factors"])


def test_more_ranks_than_variants_and_than_windows(tmp_path: Path) -> None:
    """Five ranks: four variants, four Hessian windows, and all of it waiting in files."""
    model = make(tmp_path / "model", FAMILIES["cohere"], dtype=torch.bfloat16)
    asked = {
        "choices": "int4",
        "per": "stage",
        "search_tokens": 8 * WINDOW,
        "target_size": "1GB",
        "embed_bits": 8,
    }
    arguments = (model, asked, 8, 1, True)
    one = run_ranks(1, _searched, model, asked | {"parts": 5}, 8, 1, True)[0]
    _same(run_ranks(5, _searched, *arguments), one, 5)


# ---- the model ----


def _loaded(folder: Path, dtype: torch.dtype) -> tuple[dict[str, bytes], bytes]:
    """All weights and buffers, and what the model says of some windows."""
    model = whole.load(open_checkpoint(folder), dtype).requires_grad_(False)
    held = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers()))
    with torch.no_grad():
        said = model(input_ids=_windows(2).ids).logits
    kept = {name: t.contiguous().view(-1).view(torch.uint8).numpy() for name, t in held.items()}
    return {name: t.tobytes() for name, t in kept.items()}, said.float().numpy().tobytes()


def _all_loaded(folders: list[Path]) -> list[tuple[dict[str, bytes], bytes]]:
    dtypes = (torch.float32, torch.bfloat16)
    return [_loaded(folder, dtype) for folder in folders for dtype in dtypes]


def test_ranks_load_the_model_that_one_process_loads(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, FAMILIES[name]) for name in FAMILIES]
    one = run_ranks(1, _all_loaded, folders)[0]
    for found in run_ranks(2, _all_loaded, folders):
        for ours, theirs in zip(found, one, strict=True):
            assert ours[0].keys() == theirs[0].keys()
            assert [n for n in ours[0] if ours[0][n] != theirs[0][n]] == []
            assert ours[1] == theirs[1]


# ---- the command ----


def _command(arguments: list[str]) -> tuple[int, str, str]:
    from distaya_ext.cli.app import app

    ran = CliRunner().invoke(app, arguments)
    return ran.exit_code, ran.stdout, ran.stderr


def test_one_rank_writes_and_speaks(tmp_path: Path) -> None:
    model, texts = save_model(tmp_path / "model"), save_texts(tmp_path / "texts", repeat=40)
    out = tmp_path / "recipe.yaml"
    arguments = ["search", model, "--calib", texts, "--target-size", "60KB", "--tokens", 1024]
    arguments += ["--window", 16, "--search-tokens", 384, "--group", 32, "--choices", "int8,int4"]
    arguments = [str(a) for a in [*arguments, "--out", out]]
    first, second = Ranks(2, _command, arguments, join=False).results()
    assert (first[0], second[0]) == (0, 0)
    assert "all int8" in first[1] and first[1].endswith(f"{out}\n")
    assert "variants measured" in first[2]
    assert second[1:] == ("", "")
    assert "method: gptq" in out.read_text()
    ends = Ranks(2, _command, arguments, join=False).ends()  # it is there now
    assert ends == [(False, ("gone", 2, ""))] * 2
