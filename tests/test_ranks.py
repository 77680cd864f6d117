"""The team: who has what, values and tensors on their way, sums whose order only parts decide."""

import itertools
from pathlib import Path

import pytest
import torch
from ranked import run_ranks
from tiny import FAMILIES, make

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.ranks import Parts, PartSums, Sum, Team, read_shared, reading, sums, team


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "unit"), [(0, 1), (1, 1), (7, 1), (100, 16), (128, 64), (5, 8)])
def test_shares_deal_out_everything_once(world: int, count: int, unit: int) -> None:
    shares = Team(0, world).shares(count, unit)
    assert [i for s in shares for i in range(s.start, s.stop)] == list(range(count))
    sizes = [s.stop - s.start for s in shares]
    assert max(sizes) - min(sizes) <= max(unit, unit * (count % unit > 0))
    assert all(s.start % unit == 0 for s in shares if s.stop > s.start)


def _tree(values: list[torch.Tensor]) -> torch.Tensor:
    """The sum as sums.py states it, literally."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return _tree(values[:half]) + _tree(values[half:])


def _values(count: int) -> list[list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(count)
    made = []
    for _ in range(count):
        square = torch.randn(37, 37, generator=rng).mul_(1e3)
        made.append([square, torch.randn(5, 3, generator=rng, dtype=torch.float64)])
    return made


def _summed(count: int, piece: int) -> list[torch.Tensor]:
    sums.PIECE = piece
    parts = Parts.dealt(count)
    live = [torch.zeros(37, 37), torch.zeros(5, 3, dtype=torch.float64)]
    adding = PartSums(parts, [Sum(live[0], upper=True), Sum(live[1])])
    values = _values(count)
    for part in parts.own:
        for tensor, value in zip(live, values[part], strict=True):
            tensor += value
        adding.close()
    adding.finish()
    return [live[0].triu(), live[1]]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8])
def test_one_process_adds_parts_as_the_tree_says(count: int) -> None:
    expected = [_tree([v[i] for v in _values(count)]) for i in range(2)]
    square, other = _summed(count, sums.PIECE)
    assert torch.equal(square, expected[0].triu())
    assert torch.equal(other, expected[1])
    if count > 3:  # another order gives other bits, or this test could not fail
        assert not torch.equal(square, sum(v[0] for v in _values(count)).triu())


def _many(counts: list[int]) -> list[list[torch.Tensor]]:
    return [_summed(count, piece) for count in counts for piece in (100, 1 << 24)]


@pytest.mark.parametrize("world", [2, 3])
def test_every_number_of_ranks_gives_the_same_bits(world: int) -> None:
    counts = [1, 2, 3, 4, 7, 8]  # fewer parts than ranks, too
    expected = _many(counts)
    for found in run_ranks(world, _many, counts):
        for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert torch.equal(a, b)


def _talk() -> list:
    us = team()
    assert not us.alone and us.first == (us.rank == 0)
    rows = torch.full((3, 2), us.rank, dtype=torch.bfloat16)
    shares = us.shares(7)
    own = shares[us.rank]
    mine = torch.arange(7, dtype=torch.int16)[own]
    us.wait()
    return [
        us.tell({"rank": us.rank, "text": "ä"}),
        us.gather([us.rank] * us.rank),
        us.broadcast_(rows.clone(), us.world - 1).tolist(),
        us.collect(mine, 7, shares).tolist(),
        [p.tolist() for p in us.exchange(
            [torch.full((r + 1,), 10 * us.rank + r) for r in range(us.world)],
            [us.rank + 1] * us.world,
        )],
        us.all_gather(torch.tensor([us.rank, 7])).tolist(),
    ]  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
def test_values_and_tensors_arrive(world: int) -> None:
    for rank, (told, gathered, sent, collected, exchanged, small) in enumerate(
        run_ranks(world, _talk)
    ):
        assert told == {"rank": 0, "text": "ä"}
        assert gathered == [[r] * r for r in range(world)]
        assert sent == [[world - 1] * 2] * 3
        assert collected == list(range(7))
        assert exchanged == [[10 * r + rank] * (rank + 1) for r in range(world)]
        assert small == [[r, 7] for r in range(world)]


def _read(folder: Path, whole: int) -> tuple[dict[str, torch.Tensor], int]:
    reading.WHOLE = whole
    checkpoint = open_checkpoint(folder)
    return read_shared(checkpoint, checkpoint.entries), team().read


@pytest.mark.parametrize("whole", [0, 1 << 16])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_together_read_every_byte_once(world: int, whole: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "model", FAMILIES["llama-bias"]))
    expected = checkpoint.read(checkpoint.entries)
    found = run_ranks(world, _read, tmp_path / "model", whole)
    for tensors, _ in found:
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    if world > 1:
        bytes_read = [count for _, count in found]
        assert sum(bytes_read) == checkpoint.nbytes
        assert max(bytes_read) < (1.1 if whole == 0 else 1.5) * checkpoint.nbytes / world
