"""Ranks of one process: as threads, which exchange their tables at a barrier, or by turns."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distaya_ext.ops.among import Among


class FakeRanks:
    """Ranks with so many rows each. sizes: what each of them exchanged, in order."""

    def __init__(self, rows: tuple[int, ...]):
        self.rows, self.world = rows, len(rows)
        self.sizes: list[list[int]] = [[] for _ in rows]
        self._tables: list[Any] = [None] * self.world
        self._all_here = threading.Barrier(self.world)

    def own(self, rank: int, whole: Tensor) -> Tensor:
        first = sum(self.rows[:rank])
        return whole[first : first + self.rows[rank]]

    def _exchange(self, rank: int, table: Tensor) -> Tensor:
        assert table.dtype == torch.int64 and table.is_contiguous()
        self.sizes[rank].append(len(table))
        self._tables[rank] = table.clone()
        self._all_here.wait(10)
        found = torch.stack(self._tables)
        self._all_here.wait(10)  # nobody overwrites what another still reads
        return found

    def call(self, function: Callable[[int, Among], Any]) -> list[Any]:
        """function(rank, among) of every rank, each in a thread; what it returned or raised."""
        out: list[Any] = [None] * self.world

        def run(rank: int) -> None:
            among = Among(rank, self.rows, lambda table: self._exchange(rank, table))
            try:
                out[rank] = function(rank, among)
            except Exception as error:
                out[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out

    def results(self, function: Callable[[int, Among], Any]) -> list[Any]:
        """The same; the first error is raised."""
        out = self.call(function)
        for found in out:
            if isinstance(found, Exception):
                raise found
        return out


class _WaitError(Exception):
    """A rank has come to an exchange to which the others are still to come."""


class RanksByTurns(FakeRanks):
    """For kernels of which one call runs at a time: every rank runs up to the first exchange whose
    outcome is not known yet; then they start again.
    """

    def call(self, function: Callable[[int, Among], Any]) -> list[Any]:
        known: list[Tensor] = []
        while True:
            ends = [self._up_to(function, rank, known) for rank in range(self.world)]
            waiting = [waits for waits, _ in ends]
            assert all(waiting) or not any(waiting), "the ranks do not exchange equally often"
            if not any(waiting):
                return [found for _, found in ends]
            known.append(torch.stack([table for _, table in ends]))

    def _up_to(
        self, function: Callable[[int, Among], Any], rank: int, known: list[Tensor]
    ) -> tuple[bool, Any]:
        sizes = self.sizes[rank] = []

        def exchange(table: Tensor) -> Tensor:
            sizes.append(len(table))
            if len(sizes) > len(known):
                self._tables[rank] = table.clone()
                raise _WaitError
            assert torch.equal(known[len(sizes) - 1][rank], table)  # as the time before
            return known[len(sizes) - 1]

        try:
            return False, function(rank, Among(rank, self.rows, exchange))
        except _WaitError:
            return True, self._tables[rank]


def together(parts: list[Any]) -> list[Tensor | None]:
    """The tensors of the ranks' results, one below the other."""
    return [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]


def same(found: list[Tensor | None], expected: Any) -> bool:
    """Whether they are the same bits, NaN and the sign of zero included."""
    return len(found) == len(expected) and all(
        (a is None and b is None)
        or (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(
                a.contiguous().view(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
            )
        )
        for a, b in zip(found, expected, strict=True)
    )


def check_sweep(
    W: Tensor, R: Tensor, rows: tuple[int, ...], options: dict[str, Any], kind=FakeRanks
) -> FakeRanks:
    """A sweep of the ranks gives every bit of the sweep of the whole; the ranks, afterwards."""
    from distaya_ext.ops.obs import sweep_

    whole, ranks = W.clone(), kind(rows)
    expected = (whole, *sweep_(whole, R, **options))

    def part(rank: int, among: Among) -> tuple[Tensor | None, ...]:
        mine = ranks.own(rank, W).clone()
        own = dict(options)
        if "mask" in own:
            own["mask"] = ranks.own(rank, own["mask"]).contiguous()
        return (mine, *sweep_(mine, R, **own, among=among))

    assert same(together(ranks.results(part)), expected)
    return ranks


def check_keep(scores: Tensor, k: int, rows: tuple[int, ...], kind=FakeRanks) -> FakeRanks:
    """So for the k best of a matrix, and the flag is the same on every rank."""
    from distaya_ext.ops.mask import mask_keep_k, mask_keep_k_among

    expected, bad = mask_keep_k(scores, k, "matrix")
    ranks = kind(rows)
    found = ranks.results(lambda r, among: mask_keep_k_among(ranks.own(r, scores), k, among))
    assert torch.equal(torch.cat([mask for mask, _ in found]), expected)
    assert [int(flag) for _, flag in found] == [int(bad)] * ranks.world
    return ranks


def check_admm(
    T: Tensor, H: Tensor, rows: tuple[int, ...], options: dict[str, Any], kind=FakeRanks
) -> FakeRanks:
    """So for weights and mask of ADMM."""
    from distaya_ext.ops.refit import admm

    ranks, expected = kind(rows), admm(T, H, **options)
    parts = ranks.results(lambda r, among: admm(ranks.own(r, T), H, **options, among=among))
    assert same(together(parts), expected)
    return ranks
