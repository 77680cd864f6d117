"""core/gemm.cuh's kernels in the simulator, against float64 and the bound that gemm.cuh derives."""

import ctypes
import os
from dataclasses import dataclass

import pytest
import torch
from cuda_sim import build, simulator

UNIT = 2.0**-24


def build_door(replaced: dict[str, str] | None = None) -> ctypes.CDLL:
    """gemm() by itself, in a module of its own; replaced: other text for some of its sources."""
    if os.environ.get("DISTAYA_SKIP_CUDA_SIM") == "1":
        pytest.skip("DISTAYA_SKIP_CUDA_SIM=1: the CUDA kernels are not run in the simulator")
    sources = {
        path: flags
        for path, flags in build.sources().items()
        if path.startswith("tests/") or path == "csrc/core/gemm_cuda.cu"
    }
    sources["tests/cuda_sim/doors/gemm.cpp"] = build.DOOR
    door = simulator.open_library(build.Builder(replaced, sources).module())
    door.gemm_door.restype = ctypes.c_char_p
    door.gemm_takes_large_tiles.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    return door


@pytest.fixture(scope="module")
def gemm_door() -> ctypes.CDLL:
    return build_door()


def strided(
    rows: int, cols: int, order: str, along_cols: str, aligned: bool, seed: int
) -> torch.Tensor:
    """A random matrix whose rows or columns (or neither) are contiguous.

    aligned: lines are multiples of 16 bytes apart, so that they may be copied by 16 bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    lines, length = (rows, cols) if order == along_cols else (cols, rows)
    step = 2 if order == "none" else 1
    apart = length + (-length % 4 if aligned else 1 + length % 2)
    base = torch.randn(lines, apart * step, generator=generator)
    view = base[:, : length * step : step]
    return view if order == along_cols else view.T


@dataclass
class Product:
    """C (+)= alpha A B by the simulated kernels, with what C was before."""

    A: torch.Tensor
    B: torch.Tensor
    alpha: float = -0.5
    upper_only: bool = False
    overwrite: bool = False
    lower_a: bool = False
    ldc: int = 0

    def start(self) -> torch.Tensor:
        m, n = self.A.shape[0], self.B.shape[1]
        return torch.randn(m, max(n, self.ldc), generator=torch.Generator().manual_seed(3))

    def run(self, door: ctypes.CDLL, schedule: str = "forward") -> torch.Tensor:
        C = self.start()
        (m, k), n = self.A.shape, self.B.shape[1]
        flags = (self.upper_only, self.overwrite, self.lower_a)
        sizes = (m, n, k, *self.A.stride(), *self.B.stride(), C.stride(0), *flags)
        floats = [
            sum((s - 1) * t for s, t in zip(x.shape, x.stride(), strict=True)) + 1
            for x in (self.A, self.B, C)
        ]
        door.cuda_sim_schedule(simulator.SCHEDULES.index(schedule))
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (self.A, self.B, C)]
        wrong = door.gemm_door(
            (ctypes.c_int64 * 11)(*map(int, sizes)),
            ctypes.c_float(self.alpha),
            *pointers,
            (ctypes.c_int64 * 3)(*floats),
        )
        assert wrong == b"", wrong.decode()
        return C

    def check(self, C: torch.Tensor) -> None:
        """Every element within the bound of gemm.cuh, and nothing else touched."""
        before, n, k = self.start(), self.B.shape[1], self.A.shape[1]
        A, B = self.A.double(), self.B.double()
        old = torch.zeros_like(before) if self.overwrite else before
        exact = old[:, :n] + self.alpha * (A @ B)
        # One rounding each of alpha times the sum and of the sum with C.
        scale = abs(self.alpha) * (A.abs() @ B.abs()) * (k / 16 + 50) + old[:, :n].abs() * 2
        inside = torch.ones_like(C, dtype=torch.bool)
        inside[:, n:] = False
        if self.upper_only:
            inside = inside.triu()
        assert torch.equal(C[~inside], before[~inside])
        wrong = (C[:, :n] - exact).abs() > UNIT * scale
        assert not bool((wrong & inside[:, :n]).any())


def random_product(m: int, n: int, k: int, orders: str = "kn", aligned: bool = True, **flags):
    """With A's and B's direction of memory by letter: k, m or n, or - for neither."""
    a_order, b_order = ("none" if letter == "-" else letter for letter in orders)
    A = strided(m, k, a_order, "k", aligned, 1)
    B = strided(k, n, b_order, "n", aligned, 2)
    return Product(A, B, **flags)


# one element; ragged in everything; longer than the ring of slices; whole tiles
SIZES = [(1, 1, 1), (70, 67, 35), (130, 40, 129), (64, 64, 64)]


@pytest.mark.parametrize("b_order", "kn-")
@pytest.mark.parametrize("a_order", "km-")
def test_every_direction_of_reading(gemm_door, a_order, b_order):
    for m, n, k in SIZES:
        for aligned in (False, True):
            flags = {"ldc": n + aligned, "upper_only": aligned, "overwrite": k == 64}
            product = random_product(m, n, k, a_order + b_order, aligned, **flags)
            product.check(product.run(gemm_door))


@pytest.mark.parametrize("orders", ["kk", "kn", "mk", "mn"])
def test_large_tiles(gemm_door, orders):
    """1030 x 1500 are 108 large tiles, one round of an H100, but four rounds of small ones."""
    product = random_product(1030, 1500, 9, orders)
    assert gemm_door.gemm_takes_large_tiles(1030, 1500, 0) == 1
    product.check(product.run(gemm_door))


def test_large_tiles_of_a_triangle(gemm_door):
    """Longer than the ring; 120 of 15 x 15 large tiles against 465 of 30 x 30 small ones."""
    product = random_product(1900, 1900, 69, "kk", aligned=False, upper_only=True)
    assert gemm_door.gemm_takes_large_tiles(1900, 1900, 1) == 1
    product.check(product.run(gemm_door))


def test_many_rows_and_few_columns(gemm_door):
    """obs's panel product: small tiles though there are many rows."""
    product = random_product(700, 128, 130, "kn", overwrite=True)
    assert gemm_door.gemm_takes_large_tiles(700, 128, 0) == 0
    product.check(product.run(gemm_door))


@pytest.mark.parametrize("rows", [64, 150])
def test_lower_triangular_a(gemm_door, rows):
    for orders in ("mn", "kn"):
        product = random_product(rows, 150, 150, orders, upper_only=True, overwrite=True)
        product.A.copy_(product.A.tril())
        product.lower_a = True
        product.check(product.run(gemm_door))


def test_inf_on_the_diagonal_of_a_triangle(gemm_door):
    """The last of the products that are not left out; what is right of it is not looked at."""
    product = random_product(70, 70, 70, "mn", overwrite=True, alpha=1.0)
    product.A.copy_(product.A.tril())
    product.lower_a = True
    product.A[[1, 69], [1, 69]] = float("inf")
    C, sign = product.run(gemm_door), product.B.sign()
    for row in (1, 69):
        assert torch.equal(C[row], sign[row] * float("inf"))


def test_single_products(gemm_door):
    """2^-21 |a| |b| and one rounding, where nothing is summed and nothing cut off."""
    product = random_product(300, 300, 1, "mn", overwrite=True, alpha=1.0)
    exact = product.A.double() @ product.B.double()
    error = (product.run(gemm_door).double() - exact).abs() / exact.abs()
    assert float(error.max()) <= 9.01 * UNIT


def test_all_schedules_give_the_same_bits(gemm_door):
    for orders in ("kk", "kn", "mn"):
        product = random_product(130, 70, 101, orders)
        first = product.run(gemm_door)
        for schedule in simulator.SCHEDULES[1:]:
            assert torch.equal(product.run(gemm_door, schedule), first)


def test_wide_ranges_stay_within_the_bound(gemm_door):
    product = random_product(70, 70, 200)
    product.A.mul_(torch.logspace(-12, 12, 200))
    product.B.mul_(torch.logspace(9, -9, 200)[:, None])
    product.check(product.run(gemm_door))


def test_inf_and_nan_spread_as_in_fp32(gemm_door):
    """Also a number that is finite in fp32 but would round to Inf in tf32."""
    inf, nan, most = float("inf"), float("nan"), torch.finfo(torch.float32).max
    product = random_product(80, 70, 40, alpha=1.0, overwrite=True)
    A, B = product.A, product.B
    A[3, 5], A[10, 39], A[20, 7], A[64, 0] = inf, -inf, nan, most
    A[30, 1], A[30, 2] = inf, -inf
    B[:, 66] = 0.25
    B[9, 12], B[5, 40], B[30, 50] = nan, 0.0, inf
    C = product.run(gemm_door)
    plain = torch.zeros(80, 70)
    for p in range(40):
        plain = torch.addcmul(plain, A[:, p : p + 1], B[p])
    assert torch.equal(C.isnan(), plain.isnan())
    assert torch.equal(C[C.isinf()], plain[plain.isinf()])
    assert torch.equal(C.isinf(), plain.isinf())
    assert bool(C[64, 66].isfinite()) and C[64, 66] == pytest.approx(plain[64, 66].item())
    clean = C.isfinite()
    clean[64] = False
    exact = A.double() @ B.double()
    assert bool(((C - exact).abs() <= 1e-4)[clean].all())


# Fasi et al. 2021: four products and the sum so far are aligned to the largest of them and cut off,
# then the new sum is. To 24 bits here, none more than fp32 has, as on the first such devices.
CUT_OFF = """
      double sum_so_far = d;
      for (int first = 0; first < 8; first += 4) {
        double largest = std::fabs(sum_so_far), product[4];
        for (int i = 0; i < 4; ++i) {
          product[i] = double{operand.a(row, first + i)} * b[first + i][n];
          largest = std::max(largest, std::fabs(product[i]));
        }
        if (largest == 0) continue;
        const auto cut = [](double x, double scale) {
          const double last = std::ldexp(1.0, std::ilogb(scale) - 23);
          return std::trunc(x / last) * last;
        };
        double next = cut(sum_so_far, largest);
        for (int i = 0; i < 4; ++i) next += cut(product[i], largest);
        sum_so_far = next == 0 ? 0 : cut(next, next);
      }
      m.out[lane][e] = std::bit_cast<uint32_t>(static_cast<float>(sum_so_far));"""


def test_sums_that_tensor_cores_cut_off():
    """Adding 16 products at most keeps what is lost from growing with k."""
    path = "tests/cuda_sim/cuda_sim/tensor_cores.cpp"
    text = (build.ROOT / path).read_text()
    plain = "m.out[lane][e] = std::bit_cast<uint32_t>(static_cast<float>(d + sum[n]));"
    assert text.count(plain) == 1
    door = build_door({path: "#include <cmath>\n" + text.replace(plain, CUT_OFF)})
    lost = {}
    for k in (16, 64, 2000):
        product = random_product(64, 64, k, overwrite=True, alpha=1.0)
        product.A.abs_(), product.B.abs_()
        C = product.run(door)
        product.check(C)
        exact = product.A.double() @ product.B.double()
        lost[k] = float(((exact - C) / exact).mean()) / UNIT
    assert all(1 < x < 4 for x in lost.values()), lost
