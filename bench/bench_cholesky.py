"""Factor, inverses and solves at the widths of Aya layers, beside torch's textbook routes.

tiny-aya 2048; Aya-23-8B: 4096 (q, k, v, gate, up, o) and 14336 (down). The useful work of each of
ours is n³/3 multiply-adds' worth of flop, that of a solve 2 rows n² flop; extra_info holds Gflop/s
of CPU time and the ceiling.
"""

import time

import pytest
import torch

from distaya_ext.ops import cholesky as room
from distaya_ext.ops import machine

WIDTHS = [2048, 4096, 14336]


def hessian(n: int) -> torch.Tensor:
    return torch.full((n, n), 0.5) + torch.eye(n)  # speed does not depend on the values


def record(benchmark, run, setup, n: int, rounds: int, flop: float | None = None) -> None:
    """Time run(*setup()) and note CPU seconds: on a busy machine they are what repeats."""
    seconds = []

    def timed(*operands: torch.Tensor) -> None:
        start = time.process_time()
        run(*operands)
        seconds.append(time.process_time() - start)

    benchmark.pedantic(timed, setup=lambda: (setup(), {}), rounds=rounds)
    benchmark.extra_info["cpu_seconds"] = round(min(seconds), 4)
    benchmark.extra_info["gflops"] = round((flop or n**3 / 3) / min(seconds) * 1e-9, 1)
    benchmark.extra_info["peak_one_thread"] = round(machine.peak()["fp32"], 1)
    benchmark.extra_info["threads"] = torch.get_num_threads()


@pytest.mark.parametrize("n", WIDTHS)
def test_factor(benchmark, n):
    H, R = hessian(n), torch.empty(n, n)
    state = (torch.empty(4, dtype=torch.int64), torch.empty(1, dtype=torch.float64))
    work = torch.empty(room._C.cholesky_work(H))
    record(
        benchmark,
        lambda R: room.cholesky_(R, 0.01, 1e-7, *state, work),
        lambda: (R.copy_(H),),
        n,
        rounds=1 if n > 8192 else 5,
    )


@pytest.mark.parametrize("n", WIDTHS[:2])
def test_inverse_factor(benchmark, n):
    R = room.cholesky(hessian(n)).R
    U = torch.zeros_like(R)
    record(benchmark, room.inverse_factor_, lambda: (R, U), n, rounds=5)


@pytest.mark.parametrize("n", WIDTHS[:2])
def test_inverse(benchmark, n):
    U = room.inverse_factor(room.cholesky(hessian(n)).R)
    out = torch.zeros_like(U)
    record(benchmark, room.inverse_, lambda: (U, out), n, rounds=5)


@pytest.mark.parametrize("n", WIDTHS[:2])
def test_ruler_textbook(benchmark, n):
    """cholesky, cholesky_inverse, cholesky: how U is got elsewhere (4/3 n³ flop)."""
    H = hessian(n)

    def textbook(H: torch.Tensor) -> None:
        torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)

    record(benchmark, textbook, lambda: (H,), n, rounds=3)


def solve_operands(n: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    R = room.cholesky(hessian(n)).R
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(0)), R


@pytest.mark.parametrize("rows", [16, 2048])
@pytest.mark.parametrize("n", WIDTHS[:2])
def test_solve(benchmark, n, rows):
    """B (R Rᵀ)⁻¹ in place."""
    B, R = solve_operands(n, rows)
    X = torch.empty_like(B)
    record(benchmark, room.solve_, lambda: (X.copy_(B), R), n, rounds=3, flop=2 * rows * n**2)


@pytest.mark.parametrize("rows", [16, 2048])
@pytest.mark.parametrize("n", WIDTHS[:2])
def test_ruler_solve(benchmark, n, rows):
    """torch.linalg.solve_triangular twice."""
    B, R = solve_operands(n, rows)

    def twice(B: torch.Tensor) -> None:
        X = torch.linalg.solve_triangular(R.T, B, upper=False, left=False)
        torch.linalg.solve_triangular(R, X, upper=True, left=False)

    record(benchmark, twice, lambda: (B,), n, rounds=3, flop=2 * rows * n**2)
