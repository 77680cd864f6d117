"""Bytes that ranks pass on: those counted from shapes beside those that the code sends."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranked import run_ranks
from transformers import CohereConfig

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import compress
from distaya_ext.planning import plan, probe, traffic
from distaya_ext.planning.traffic import Traffic
from distaya_ext.ranks import Parts, PartSums, Sum, Team, reading, sums, team


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("source") / "llama", tiny.FAMILIES["llama"])


class Counting(Team):
    """A rank that sends to nobody and counts what the code hands it; come: bytes that arrive."""

    come = 0

    def exchange(self, parts, sizes):
        self.sent += sum(p.nbytes for rank, p in enumerate(parts) if rank != self.rank)
        size = parts[0].element_size()
        self.come += size * (sum(sizes) - sizes[self.rank])
        return [parts[0].new_zeros(size) for size in sizes]

    def broadcast_(self, tensor, source=0, group=None):
        if source == self.rank:
            self.sent += tensor.nbytes
        else:
            self.come += tensor.nbytes
        return tensor


@pytest.mark.parametrize("piece", [100, 1 << 24])
@pytest.mark.parametrize(("world", "count"), [(2, 2), (3, 3), (2, 5), (3, 8), (3, 2), (8, 8)])
def test_sums_pass_what_is_counted(monkeypatch, world, count, piece):
    monkeypatch.setattr(sums, "PIECE", piece)
    expected = traffic.summed(37, 37, Parts.dealt(count, Team(0, world)), upper=True)
    expected += traffic.summed(5, 3, Parts.dealt(count, Team(0, world)), itemsize=8)
    for rank in range(world):
        by = Counting(rank, world)
        live = [Sum(torch.zeros(37, 37), upper=True), Sum(torch.zeros(5, 3, dtype=torch.float64))]
        adding = PartSums(Parts.dealt(count, by), live, by)
        for _ in adding.parts.own:
            adding.close()
        adding.finish()
        assert (by.sent, by.come) == (expected.given[rank], expected.arrived[rank])


def test_a_hessian_costs_each_of_n_ranks_its_triangle_less_its_own_share():
    for columns, world in itertools.product((4096, 14336, 24576), (2, 4, 8)):
        one = traffic.summed(columns, columns, Parts.dealt(world, Team(0, world)), upper=True)
        share = 4 * columns**2 / 2 * (world - 1) / world
        assert max(one.come) == pytest.approx(share, rel=0.13)  # out of the others' sums
        assert max(one.arrived) == pytest.approx(2 * share, rel=0.13)  # and the whole of them
    assert traffic.summed(columns, columns, Parts(), upper=True) == Traffic.none(1)


def test_how_many_sums_a_rank_passes_on():
    for start, stop in itertools.combinations(range(40), 2):
        kept = sums._blocks_of(range(start, stop))
        assert traffic.kept_sums(range(start, stop)) == len(kept), (start, stop)
    assert traffic.kept_sums(range(3, 3)) == 0


@pytest.mark.parametrize("whole", [0, 1 << 16])
@pytest.mark.parametrize("world", [2, 3])
def test_reading_passes_what_is_counted(monkeypatch, source, world, whole):
    monkeypatch.setattr(reading, "WHOLE", whole)
    checkpoint = open_checkpoint(source)
    entries = checkpoint.entries.values()
    expected = traffic.read_shared([(e.shape, e.dtype.itemsize) for e in entries], world)
    for rank in range(world):
        by = Counting(rank, world)
        reading.read_shared(checkpoint, checkpoint.entries, by)
        assert (by.sent, by.come) == (expected.given[rank], expected.arrived[rank])
        assert by.read == expected.told[rank]
    assert sum(expected.told) == checkpoint.nbytes


def test_seconds_of_traffic():
    one = Traffic((30, 10), (10, 30), (6, 4))
    assert one.given == (36, 14) and one.arrived == (14, 36)
    assert one.seconds(10.0) == (30 + 10) / 10
    assert one.seconds(10.0, 3) == (30 + 30) / 10
    assert (one + one * 2).passed == (90, 30)
    assert Traffic.none(1).seconds(1.0) == 0


WIDE = CohereConfig(
    num_hidden_layers=2,
    logit_scale=0.25,
    **{**tiny.SIZES, "hidden_size": 192, "intermediate_size": 448},
)
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"nm": "2:4", "quality": "plain"},
    "default": {"nm": "2:4", "bits": 4, "group": 32},
    "half": {"sparsity": 0.5},
    "high": {"nm": "2:4", "quality": "high"},
    "high, codes": {"method": "gptq", "bits": 4, "group": 32, "quality": "high"},
    "wanda": {"method": "wanda"},
}


def _fields(name: str, parts: int | None = None) -> Any:
    return tiny.recipe(**RECIPES[name], calibration={"tokens": 1 << 20, "parts": parts})


def _counted(source: Path, out: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for name in RECIPES:
        before = team().sent, team().read
        compress(source, out / name, _fields(name), tiny.windows(17))
        found[name] = team().sent - before[0], team().read - before[1]
    return found


def test_a_run_passes_and_reads_what_was_said(tmp_path, monkeypatch):
    told = {"process": 400 << 20, "startup": 1.0}
    monkeypatch.setattr(probe, "ask", lambda request: told)
    model = tiny.make(tmp_path / "model", WIDE, dtype=torch.bfloat16)
    ranks = run_ranks(2, _counted, model, tmp_path / "out")
    for name in RECIPES:
        said = plan(
            model, _fields(name), tiny.windows(17), ranks=[2], network="1GB/s", rehearse=False
        ).scaling
        sent = max(each[name][0] for each in ranks)
        assert said.rows[0].sent == pytest.approx(sent, rel=0.02), name
        read = max(each[name][1] for each in ranks)
        assert said.rows[0].read == pytest.approx(read, rel=0.01), name  # who has the small ones
