"""What each lane of a warp takes from a packed tile, multiplied through an emulated tensor core.

mma.m16n8k16 and mma.sp.m16n8k32 are emulated lane by lane from the fragment and metadata maps of
the PTX ISA ("Matrix fragments for mma.m16n8k16 with floating point type", "... for sparse
mma.m16n8k32 with .f16/.bf16 types"); real buffers of ops.pack are read with the very functions
that the CUDA kernels use (csrc/sqgemm/fragments.h), and the product must be exact.
"""

import numpy as np
import pytest
import torch

from distaya_ext import _C
from distaya_ext.ops import pack as P
from distaya_ext.ops import sqgemm

LANES, GROUP, QUAD = np.arange(32), np.arange(32) // 4, np.arange(32) % 4
KINDS = ("int4", "int8", "int4-2:4")
TOKENS = 8


def scattered(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape) -> np.ndarray:
    """The matrix that lanes hold in pieces; every element must come from exactly one of them."""
    out, seen = np.zeros(shape), np.zeros(shape, int)
    np.add.at(seen, (rows, columns), 1)
    assert (seen == 1).all()
    out[rows, columns] = values
    return out


def operand_a(a: np.ndarray) -> np.ndarray:
    """A [16, 16] from a [32 lanes, 8 values]."""
    i = np.arange(8)
    rows = np.where(i // 2 % 2 == 0, GROUP[:, None], GROUP[:, None] + 8)
    columns = QUAD[:, None] * 2 + i % 2 + np.where(i < 4, 0, 8)
    return scattered(rows, np.broadcast_to(columns, rows.shape), a, (16, 16))


def operand_b(b: np.ndarray) -> np.ndarray:
    """B [2 n, 8] from b [32 lanes, n values], n = 4 (dense) or 8 (sparse)."""
    i = np.arange(b.shape[1])
    rows = QUAD[:, None] * 2 + i % 2 + 8 * (i // 2)
    columns = np.broadcast_to(GROUP[:, None], rows.shape)
    return scattered(rows, columns, b, (4 * b.shape[1], 8))


def widened(A: np.ndarray, meta: np.ndarray, selector: int) -> np.ndarray:
    """A [16, 32] of mma.sp from its kept half [16, 16] and the metadata words of 32 lanes."""
    out = np.zeros((16, 32))
    for row in range(16):
        for group in range(8):
            lane = 4 * (row % 8) + 2 * selector + group // 4
            nibble = int(meta[lane]) >> (16 * (row // 8) + 4 * (group % 4)) & 15
            low, high = nibble & 3, nibble >> 2
            assert low < high, "ordered metadata has its lower index first"
            out[row, 4 * group + low] = A[row, 2 * group]
            out[row, 4 * group + high] = A[row, 2 * group + 1]
    return out


def tables(kind: str) -> dict:
    """fragments.h as arrays."""
    f = _C.sqgemm_fragments(P.KINDS.index(kind))
    steps = f["steps"]
    return {
        "a": np.array(f["a"]).reshape(steps, 4, 32, 8, 2),
        "b": np.array(f["b"]).reshape(steps, 32, -1),
        "meta": np.array(f["meta"]).reshape(-1, 4, 32),
        "rows": np.array(f["rows"]).reshape(4, 16),
        "pair_slabs": np.array(f["pair_slabs"]).reshape(4, 32),
        "pair_rows": np.array(f["pair_rows"]).reshape(2, 4, 16),
        "order": np.array(f["order"]),
    }


def head_bytes(form: P.Format) -> int:
    """Scales and zeros in front of a record's body."""
    groups = 128 // form.group if form.group else 0
    return 64 * groups * (form.scale_dtype.itemsize + (not form.symmetric))


def body_words(data: np.ndarray, form: P.Format, tile: int) -> np.ndarray:
    """The body of a tile as 32-bit words."""
    bytes_ = {"int4": 4096, "int8": 8192, "int4-2:4": 3072}[form.kind]
    begin = tile * (head_bytes(form) + bytes_) + head_bytes(form)
    return data[begin : begin + bytes_].view(np.uint32).astype(np.int64)


def tile_product(words: np.ndarray, zero: np.ndarray, x: np.ndarray, t: dict, bits: int):
    """[64, 8] of differences code - zero times x [128, 8]. zero [64, 128]: of each weight."""
    out = np.zeros((64, TOKENS))
    sparse = t["meta"].size > 0
    for step in range(t["a"].shape[0]):
        B = operand_b(x[t["b"][step], GROUP[:, None]])
        # A column of each lane's own in this step: all of them share a scale and a zero.
        own = 64 * (step // 2) + 16 * QUAD if sparse else t["b"][step][:, 0]
        for slab in range(4):
            at = t["a"][step, slab]
            codes = words[at[..., 0]] >> at[..., 1] & (1 << bits) - 1
            halves = np.arange(8) // 2 % 2  # registers 1 and 3 hold row g + 8
            rows = t["rows"][slab][GROUP[:, None] + 8 * halves]
            A = operand_a(codes - zero[rows, own[:, None]])
            if sparse:
                A = widened(A, words[t["meta"][step, slab]], step % 2)
            D = A @ B
            for i in range(4):  # c0, c1 row g; c2, c3 row g + 8; columns 2c, 2c + 1
                row = t["rows"][slab][GROUP + 8 * (i // 2)]
                out[row, QUAD * 2 + i % 2] += D[GROUP + 8 * (i // 2), QUAD * 2 + i % 2]
    return out


def content(kind: str, rows: int, cols: int, group: int, symmetric: bool):
    """Random codes (2:4 with 0, 1 and 2 kept), scales of 1, zeros."""
    rng = torch.Generator().manual_seed(rows + cols + group)
    form = P.Format(kind, rows, cols, group, symmetric, torch.bfloat16)
    top = 1 << form.bits
    codes = torch.randint(0, top, (rows, cols), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, top, (rows, form.groups), generator=rng, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(top // 2)
    wide = zeros.repeat_interleave(group or cols, 1)[:, :cols]
    if kind == "int4-2:4":
        rank = torch.rand(rows, -(-cols // 4), 4, generator=rng).argsort(-1).argsort(-1)
        most = torch.randint(0, 3, (rows, rank.shape[1], 1), generator=rng)
        codes = torch.where((rank < most).reshape(rows, -1)[:, :cols], codes, wide)
    scales = torch.ones(rows, form.groups, dtype=torch.bfloat16)
    packed = P.pack(codes, scales, None if symmetric else zeros, kind=kind, group=group)
    return packed, codes.numpy().astype(int), wide.numpy().astype(int)


def multiplied(packed, wide, x, data=None, t=None):
    """(code - zero) x of the whole matrix, tile by tile through the fragments."""
    form, t = packed.format, t or tables(packed.format.kind)
    data = packed.data.numpy() if data is None else data
    row_tiles, col_tiles = -(-form.rows // 64), -(-form.cols // 128)
    out = np.zeros((row_tiles * 64, TOKENS))
    zero = np.zeros((row_tiles * 64, col_tiles * 128), int)
    zero[: form.rows, : form.cols] = wide  # padding meets activations of 0
    padded = np.zeros((col_tiles * 128, TOKENS))
    padded[: form.cols] = x
    for i in range(row_tiles):
        for j in range(col_tiles):
            words = body_words(data, form, i * col_tiles + j)
            rows, cols = slice(64 * i, 64 * i + 64), slice(128 * j, 128 * j + 128)
            out[rows] += tile_product(words, zero[rows, cols], padded[cols], t, form.bits)
    return out[: form.rows]


def tokens(cols: int) -> np.ndarray:
    return np.random.default_rng(cols).integers(-64, 65, (cols, TOKENS)).astype(float)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
def test_fragments_multiply_exactly(kind, group, symmetric):
    """Integers throughout, so nothing rounds: any wrong place shows."""
    for rows, cols in ((64, 128), (70, 283), (1, 5)):
        packed, codes, wide = content(kind, rows, cols, group, symmetric)
        x = tokens(cols)
        assert (multiplied(packed, wide, x) == (codes - wide) @ x).all(), (rows, cols)


def test_a_wrong_metadata_bit_is_seen():
    """Two weights kept in every group of 4: any other pair of indices changes the product."""
    rng = np.random.default_rng(0)
    kept = rng.random((64, 32, 4)).argsort(2).reshape(64, 128) < 2
    codes = np.where(kept, rng.integers(9, 16, (64, 128)), 8).astype(np.uint8)
    packed = P.pack(torch.from_numpy(codes), torch.ones(64, 1), kind="int4-2:4")
    x, wide = tokens(128), np.full((64, 128), 8)
    data, meta = packed.data.numpy(), head_bytes(packed.format) + 2048
    right = multiplied(packed, wide, x)
    assert (right == (codes - 8.0) @ x).all()
    for byte in (0, 1, 2, 3, 517, 1023):
        for shift in (0, 4):
            nibble = data[meta + byte] >> shift & 15
            for other in {low | high << 2 for high in range(4) for low in range(high)} - {nibble}:
                wrong = data.copy()
                wrong[meta + byte] ^= (nibble ^ other) << shift
                assert not (multiplied(packed, wide, x, wrong) == right).all(), (byte, shift)


def test_a_metadata_bit_that_breaks_the_order_is_refused():
    packed, _, wide = content("int4-2:4", 64, 128, 128, True)
    wrong = packed.data.numpy().copy()
    wrong[head_bytes(packed.format) + 2048] |= 15  # both indices 3
    with pytest.raises(AssertionError, match="lower index first"):
        multiplied(packed, wide, tokens(128), wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", ["a", "b", "rows"])
def test_a_wrong_lane_is_seen(kind, table):
    packed, codes, wide = content(kind, 64, 128, 128, True)
    x, t = tokens(128), tables(kind)
    wrong = t[table].copy()
    if table == "rows":
        wrong[0, [0, 1]] = wrong[0, [1, 0]]
    else:
        lanes = wrong[0, 0] if table == "a" else wrong[0]
        lanes[[0, 1]] = lanes[[1, 0]]
    product = multiplied(packed, wide, x, t=t | {table: wrong})
    assert not (product == (codes - wide) @ x).all()


def test_fragments_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="not of kind number 1"):
        _C.sqgemm_fragments(1)


# ---- the kernels themselves ----

ALL = [(kind, None) for kind in P.KINDS if kind != "int4-out"] + [("int4-out", (2, 4))]
U = 2.0**-24


def anything(kind: str, nm, rows: int, cols: int, group: int, symmetric: bool) -> P.PackedWeight:
    """A packed matrix of any kind with random scales, on the GPU."""
    rng = torch.Generator().manual_seed(rows * cols)
    form = P.Format(kind, rows, cols, group, symmetric, torch.bfloat16, nm)
    codes = torch.randint(0, 1 << form.bits, (rows, cols), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << form.bits, (rows, form.groups), generator=rng, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(1 << form.bits - 1)
    wide = zeros.repeat_interleave(group or cols, 1)[:, :cols]
    if kind == "int4-mask":
        codes = torch.where(torch.rand(rows, cols, generator=rng) < 0.5, codes, wide)
    elif kind == "int4-2:4":
        codes = torch.where(torch.arange(cols) % 4 < 2, codes, wide)
    elif kind == "int4-out":
        codes = torch.where((torch.arange(rows) % 4 < 2)[:, None], codes, wide)
    scales = (torch.rand(rows, form.groups, generator=rng) + 0.5).bfloat16()
    packed = P.pack(codes, scales, None if symmetric else zeros, kind=kind, group=group, nm=nm)
    return packed.to("cuda")


def far_off(y: torch.Tensor, x: torch.Tensor, packed: P.PackedWeight) -> float:
    """Greatest error of y = x W^T over its bound: sums of exact products in fp32, one rounding.

    Tensor cores may cut instead of round: 2 u for each of the g + K / g + 4 additions.
    """
    W = P.reference_dequantize(*P.unpack(packed), bits=packed.format.bits).double()
    exact, most = x.double() @ W.t(), x.double().abs() @ W.abs().t()
    group = packed.format.group or 128
    bound = 2 * (group + x.shape[1] / group + 4) * U * most
    bound += torch.finfo(x.dtype).eps / 2 * (exact.abs() + bound)
    return float(((y.double() - exact).abs() / (bound + 1e-30)).max())


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "nm"), ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_stay_within_their_bound(kind, nm, dtype):
    for group, symmetric in ((32, False), (64, True), (128, True), (0, False)):
        packed = anything(kind, nm, 200, 1100, group, symmetric)
        for count in (1, 7, 8, 9, 16, 17, 33, 64, 65, 100):
            x = (torch.randn(count, 1100, device="cuda") / 16).to(dtype)
            with sqgemm.force_wgmma(False):
                y = sqgemm.linear(x, packed)
                assert far_off(y, x, packed) <= 1, (group, symmetric, count)
                assert torch.equal(y, sqgemm.linear(x, packed))


@pytest.mark.cuda
def test_kernels_run_inside_a_graph():
    packed = anything("int4-2:4", None, 4096, 4096, 128, True)  # its columns are split
    x = torch.randn(3, 4096, device="cuda").bfloat16()
    expected = sqgemm.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sqgemm.linear(x, packed)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 20, 100])
def test_early_launches_keep_their_order(tokens):
    """A chain of products, each of the one before: the same with and without pauses, in a graph."""
    packed = [anything(kind, None, 2048, 2048, 128, True) for kind in ("int4", "int4-2:4")]
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()

    def chain(pause: bool) -> torch.Tensor:
        y = x
        for turn in range(12):
            y = sqgemm.linear(y, packed[turn % 2])
            if pause:
                torch.cuda.synchronize()
        return y

    expected = chain(pause=True)
    assert expected.isfinite().all() and expected.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(pause=False)
    for _ in range(50):
        assert torch.equal(chain(pause=False), expected)
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def pair_product(words: list, zeros: list, x: np.ndarray, t: dict) -> np.ndarray:
    """[128, 8] of a pair of tiles, as a warpgroup multiplies them: two products of 64 rows.

    words, zeros, x: as in tile_product, of each tile. Operand B's rows are x in shared memory's
    order.
    """
    out = np.zeros((128, TOKENS))
    sparse = t["meta"].size > 0
    columns = 32 if sparse else 16
    for step in range(t["a"].shape[0]):
        B = x[t["order"][columns * step : columns * (step + 1)]]
        own = 64 * (step // 2) + 16 * QUAD if sparse else t["b"][step][:, 0]
        for product in range(2):
            for warp in range(4):
                tile, slab = warp // 2, t["pair_slabs"][warp] + product
                at = t["a"][step, slab, LANES]
                codes = words[tile][at[..., 0]] >> at[..., 1] & 15
                halves = np.arange(8) // 2 % 2
                rows = t["pair_rows"][product, warp][GROUP[:, None] + 8 * halves]
                A = operand_a(codes - zeros[tile][rows - 64 * tile, own[:, None]])
                if sparse:
                    A = widened(A, words[tile][t["meta"][step, slab, LANES]], step % 2)
                out[t["pair_rows"][product, warp]] += A @ B
    return out


@pytest.mark.parametrize("kind", ["int4", "int4-2:4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_a_warpgroup_multiplies_exactly(kind, group, symmetric):
    """PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": warp w has rows 16 w .. 16 w + 15
    of A and D, as in mma; of the sparse form, metadata as in mma.sp.
    """
    packed, codes, wide = content(kind, 128, 128, group, symmetric)
    x, t = tokens(128), tables(kind)
    words = [body_words(packed.data.numpy(), packed.format, tile) for tile in range(2)]
    y = pair_product(words, [wide[:64], wide[64:]], x, t)
    assert (y == (codes - wide) @ x).all()
    assert (pair_product(words, [wide[:64], wide[64:]], x[::-1], t) != y).any()
    wrong = t["pair_slabs"].copy()
    wrong[0, [0, 8]] = wrong[0, [8, 0]]
    swapped = pair_product(words, [wide[:64], wide[64:]], x, t | {"pair_slabs": wrong})
    assert (swapped != y).any()
