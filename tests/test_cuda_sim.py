"""The simulator of CUDA kernels finds what it says it finds: planted bugs, and nothing else."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from cuda_sim import build
from cuda_sim.simulator import SCHEDULES, Simulator, bits, obtain
from packed import content

from distaya_ext.ops import mask as M
from distaya_ext.ops import pack as P
from distaya_ext.ops import sqgemm
from distaya_ext.packed import DENSE_BODY

# What each planted bug is called, and where it must be found whatever the schedule. Numbers of
# threads depend on the schedule; variables, sizes and places do not.
SENTENCES = {
    "block_race": r"^race: reads byte \d+ of shared x \(512 bytes\), which thread \d+ has written "
    r"with no barrier since; kernel planted::block_race, tests/cuda_sim/planted.cu:\d+, thread \d+ "
    r"of block \(0, 0, 0\) of 128 threads$|^not written: reads byte \d+ of shared x",
    "overwrite_race": r"^race: (writes|reads) byte \d+ of shared x .* has (read|written) with no",
    "warp_race": r"^race: reads .*shared x|^not written: reads byte \d+ of shared x",
    "shuffle_orders_no_memory": r"^race: reads byte \d+ of shared x .*has written with no barrier",
    "atomic_race": r"^race: (writes|changes) byte 0 of shared sum \(4 bytes\), which .* has "
    r"(changed by an atomic|written) with no barrier",
    "two_blocks_write": r"^race: writes byte \d+ of out, which thread \d+ of block \([01], 0, 0\) "
    r"of the launch has written: nothing orders blocks",
    "block_reads_another": r"^race: (reads|writes) byte \d+ of out, which .* of block .* has "
    r"(written|read): nothing orders blocks",
    "waits_for_another_block": r"^no end: \d+ accesses in a row, the last of byte 0 of out; blocks",
    "divergent_barrier": r"^divergence: __syncthreads while other threads .* wait at the one of "
    r"tests/cuda_sim/planted.cu:\d+",
    "deadlock": r"^deadlock: thread \d+ waits at \S+ \(.*planted.cu:\d+\) and thread \d+ waits at "
    r"\S+ \(.*planted.cu:\d+\)",
    "divergent_lanes": r"^divergence: (__syncwarp|__shfl_xor_sync) is called while thread \d+ of "
    r"the warp waits at (__syncwarp|__shfl_xor_sync) ",
    "mask_without_caller": r"^wrong mask: __shfl_xor_sync is called by lane \d+, which its mask ",
    "mask_with_ended_lanes": r"^wrong mask: __shfl_xor_sync waits for lane \d+, which has ended|"
    r"^divergence: ends while other lanes wait for it at __shfl_xor_sync",
    "ends_while_waited_for": r"^wrong mask: .* lane 31, which has ended|^divergence: ends while",
    "shared_out_of_bounds": r"^out of bounds: writes 4 bytes at 0 bytes behind the end of shared x "
    r"\(512 bytes\); kernel .*, tests/cuda_sim/planted.cu:\d+, thread 127 ",
    "dynamic_out_of_bounds": r"^out of bounds: writes 4 bytes at byte 512 of dynamic shared memory "
    r"\(512 bytes\)",
    "too_much_shared": "CUDA error 'invalid argument'",
    "tensor_out_of_bounds": r"^out of bounds: reads 4 bytes at 0 bytes behind the end of in;.* "
    r"thread 127 ",
    "unwritten": r"^not written: reads byte 28 of shared x \(512 bytes\), which no thread",
    "misaligned_vector": r"^misaligned: byte \d+ of in is not at a multiple of 16 bytes; .*:\d+",
    "copy_not_waited": r"^copy under way: reads byte \d+ of shared x .* has not been waited for",
    "copy_of_another_group": r"^copy under way: reads byte \d+ of shared x",
    "copy_without_barrier": r"^(race: reads|copy under way: reads|not written: reads) byte \d+ of",
    "copy_overwritten": r"^copy under way: writes byte \d+ of shared x",
    "misaligned_copy": r"^misaligned: an asynchronous copy of 16 bytes at byte \d+ of in;",
    "reads_too_early": r"^too early: reads byte \d+ of out before wait_for_earlier",
    "writes_too_early": r"^too early: writes byte \d+ of out before wait_for_earlier",
    "illegal_metadata": r"^illegal metadata: group 0 of row 0 of a 2:4 operand keeps columns 1 and "
    r"0, which do not rise",
}


class Planted:
    """The planted kernels of tests/cuda_sim/planted*.cu."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.run_planted.restype = ctypes.c_char_p
        self.library.run_products.restype = ctypes.c_char_p
        self.library.planted_names.restype = ctypes.c_char_p

    def run(self, name: str, bug: bool, schedule: str) -> tuple[str | None, torch.Tensor]:
        """The complaint, and what the kernel left in `out`."""
        self.library.cuda_sim_schedule(SCHEDULES.index(schedule))
        given, out = torch.arange(1024.0), torch.zeros(1024)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (given, out)]
        said = self.library.run_planted(name.encode(), *pointers, int(bug))
        return said.decode() if said else None, out

    def product(self, A, B, meta, sparse: bool, bug: int, schedule: str):
        """The complaint, and D [64, 16]."""
        self.library.cuda_sim_schedule(SCHEDULES.index(schedule))
        D = torch.zeros(64, 16)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (A, B, meta, D)]
        said = self.library.run_products(*pointers, int(sparse), bug)
        return said.decode() if said else None, D


@pytest.fixture(scope="session")
def planted(simulator):  # which says why nothing can be built
    return Planted(build.build_with("planted.cu", "planted_products.cu"))


def test_every_planted_kernel_has_its_sentence(planted):
    assert planted.library.planted_names().decode().split() == sorted(SENTENCES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SENTENCES)
def test_a_planted_bug_is_found_and_its_cure_passes(planted, name, schedule):
    said, right = planted.run(name, False, schedule)
    assert said is None and bool(right[:16].any())
    assert bits(right) == bits(planted.run(name, False, "forward")[1])
    said, _ = planted.run(name, True, schedule)
    assert said is not None and re.search(SENTENCES[name], said), said


def test_work_goes_on_after_a_violation(planted):
    for name in SENTENCES:
        planted.run(name, True, "random")
        assert planted.run(name, False, "random")[0] is None


# ---- products of a warpgroup ----


def operands(sparse: bool):
    """A's stored values [64, 32], B [16, 64], metadata [2, 128], and the product in float64."""
    rng = torch.Generator().manual_seed(1)
    A = torch.randint(-8, 9, (64, 32), generator=rng).to(torch.bfloat16)
    B = torch.randint(-8, 9, (16, 64), generator=rng).to(torch.bfloat16)
    meta = torch.zeros(2, 128, dtype=torch.int32)
    if not sparse:
        return A, B, meta, A.double() @ B[:, :32].double().t()
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    chosen = pairs[torch.randint(0, 6, (64, 16), generator=rng)]  # of each group of 4 columns
    full = torch.zeros(64, 16, 4, dtype=torch.float64)
    full.scatter_(2, chosen, A.double().reshape(64, 16, 2))
    words = meta.numpy().view("uint32")
    nibbles = (chosen[..., 0] + 4 * chosen[..., 1]).tolist()
    for step in range(2):
        for row in range(64):
            for group in range(8):
                thread = row // 16 * 32 + row % 8 * 4 + 2 * step + group // 4
                shift = 16 * (row % 16 // 8) + 4 * (group % 4)
                words[step, thread] |= nibbles[row][8 * step + group] << shift
    return A, B, meta, full.reshape(64, 64) @ B.double().t()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_products_of_a_warpgroup(planted, sparse, schedule):
    A, B, meta, expected = operands(sparse)  # small integers: exact
    said, D = planted.product(A, B, meta, sparse, 0, schedule)
    assert said is None and torch.equal(D.double(), expected)


PRODUCT_BUGS = {
    1: r"^not fenced: a product reads byte \d+ of dynamic shared memory .* without fence_for_",
    2: r"^(race|copy under way|not written|not fenced): a product reads byte \d+ of dynamic",
    3: r"^not fenced: a product begins without product_fence",
    4: r"^in use: writes byte \d+ of dynamic shared memory .*a product under way still reads",
    6: r"^divergence: the warps of a group issue different products",
    7: r"^in use: register 2 of a product's operand A was written before .*planted_products.cu:\d+",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", PRODUCT_BUGS)
def test_a_bug_around_products_is_found(planted, bug, schedule):
    said, _ = planted.product(*operands(True)[:3], True, bug, schedule)
    assert said is not None and re.search(PRODUCT_BUGS[bug], said), said


def test_a_product_is_not_there_before_the_wait(planted):
    said, D = planted.product(*operands(False)[:3], False, 5, "forward")
    assert said is None and bool(D.isnan().all())


# ---- real kernels ----


def test_a_barrier_deleted_from_a_real_kernel_is_found(simulator):
    path = "csrc/mask/nm_cuda.cu"
    text = (build.ROOT / path).read_text()
    barrier = "__syncthreads();"
    assert text.count(barrier) >= 4
    broken = Simulator(build.build({path: text.replace(barrier, " " * len(barrier), 1)}))
    scores = torch.randn(6, 400)
    expected = M.keep_nm(scores, 2, 4)
    assert torch.equal(simulator.same_always(lambda: M.keep_nm(scores, 2, 4)), expected)
    for schedule in SCHEDULES:
        with (
            broken.use(),
            broken.schedule(schedule),
            pytest.raises(
                RuntimeError,
                match=r"shared keys .*; kernel mask::inputs_kernel, csrc/mask/nm_cuda.cu:",
            ),
        ):
            M.keep_nm(scores, 2, 4)


def test_a_wrong_metadata_bit_changes_a_product(simulator):
    """The kept columns of a packed 2:4 matrix are read from its metadata and nowhere else."""
    codes, scales, _ = content("int4-2:4", 64, 128, 128, True, torch.bfloat16)
    packed = P.pack(codes, scales, kind="int4-2:4", group=128)
    x = torch.randn(3, 128).to(torch.bfloat16)
    right = sqgemm.linear(x, packed, exact=True)
    with simulator.use():
        assert torch.allclose(sqgemm.linear(x, packed, exact=True), right, rtol=0.02, atol=0.02)
    # After the scales come 512 words of codes, then the pairs: one of columns 0, 1 becomes 0, 3.
    body = packed.data[P.TILE_ROWS * 2 :][: DENSE_BODY["int4-2:4"]].view(torch.int32)
    nibbles = ((word, shift) for word in range(512, 640) for shift in range(0, 28, 4))
    word, shift = next((w, s) for w, s in nibbles if int(body[w]) >> s & 15 == 4)
    body[word] ^= 8 << shift
    with simulator.use():
        wrong = sqgemm.linear(x, packed, exact=True)
    assert not torch.allclose(wrong, right, rtol=0.02, atol=0.02)
    assert torch.allclose(wrong, sqgemm.linear(x, packed, exact=True), rtol=0.02, atol=0.02)


# ---- around it ----


def test_the_simulator_stands_beside_the_real_module(simulator):
    from distaya_ext import _C

    assert simulator.module is not _C and simulator.module.has_cuda
    assert simulator.module.cuda_status()["device0"].startswith("simulated GPU, sm_90")
    scores = torch.randn(4, 8)
    with simulator.use():
        assert M._C is simulator.module
        with pytest.raises(ValueError, match="cannot keep 9 of the 8 scores of a row"):
            M.keep_k(scores, 9)
    assert M._C is _C


def test_a_cpu_twin_is_not_in_there(simulator):
    with pytest.raises(RuntimeError, match="is not simulated"):
        simulator.module.peak()


def test_without_a_compiler_tests_fail_with_a_sentence(monkeypatch):
    monkeypatch.delenv("DISTAYA_SKIP_CUDA_SIM", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.fail.Exception, match=r"needs g\+\+, which is not on PATH; install"):
        obtain()
    monkeypatch.setenv("DISTAYA_SKIP_CUDA_SIM", "1")
    with pytest.raises(pytest.skip.Exception, match="are not run in the simulator"):
        obtain()
