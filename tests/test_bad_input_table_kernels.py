"""The table of bad inputs, continued: tensors at the border of the kernels, threads, fork, rank."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from packed import content, same_bits
from speaking import save_model, save_texts
from strangers import distaya

from distaya_ext.ops import hessian, mask, sqgemm
from distaya_ext.ops import pack as P

# ---- what is no plain tensor ----


def misaligned(shape):
    """float32 at an address that 4 does not divide."""
    count = int(np.prod(shape))
    return torch.frombuffer(
        bytearray(4 * count + 8), dtype=torch.float32, count=count, offset=1
    ).view(shape)


BORDER = {
    "not contiguous": (torch.zeros(16, 8).t(), "not contiguous"),
    "zero strides": (torch.zeros(1, 1).expand(8, 16), "not contiguous"),
    "another dtype": (torch.zeros(8, 16, dtype=torch.int64), "must|needs|no kernel takes"),
    "a dtype no kernel has": (torch.zeros(8, 16, dtype=torch.complex64), "type code 5"),
    "misaligned": (misaligned((8, 16)), "not aligned"),
    "0-d": (torch.tensor(1.0), r"\[|dim"),
    "requires grad": (torch.zeros(8, 16, requires_grad=True), "grad"),
    "another size": (torch.zeros(8, 15), "15"),
}


@pytest.mark.parametrize("case", BORDER)
def test_row_tensors_that_cannot_be_borrowed_are_refused(case):
    """A ValueError in one sentence, before the kernel has written a byte; nothing is copied."""
    bad, words = BORDER[case]
    H, before = torch.ones(16, 16), torch.ones(16, 16)
    with pytest.raises(ValueError, match=words) as caught:
        hessian.hessian_(H, bad)
    assert "\n" not in str(caught.value) and torch.equal(H, before)


def test_row_arrays_with_negative_strides_are_refused():
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        hessian.hessian_(torch.zeros(16, 16), np.zeros((8, 16), np.float32)[::-1])


def test_row_nothing_gives_nothing():
    """Zero-size tensors are served: no token changes H, no row packs to no codes."""
    H = torch.ones(16, 16)
    hessian.hessian_(H, torch.zeros(0, 16))
    assert torch.equal(H, torch.ones(16, 16))
    empty = P.pack(torch.zeros(0, 64, dtype=torch.uint8), torch.zeros(0, 1))
    assert P.unpack(empty)[0].shape == (0, 64) and P.dequantize(empty).shape == (0, 64)
    assert sqgemm.linear(torch.zeros(0, 64, dtype=torch.bfloat16), empty).shape == (0, 0)


def test_row_more_than_2_31_elements_and_bytes():
    """The last rows of a packed matrix of 2^32 codes in 2.2 GB (pages of zeros take no memory)."""
    cols, rows = 4096, (1 << 20) + 64
    codes, scales, zeros = content("int4", 64, cols, group=128)
    last = P.pack(codes, scales, zeros)
    form = P.Format("int4", rows, cols)
    assert rows * cols > 1 << 31 and form.nbytes > 1 << 31
    data = torch.from_numpy(np.zeros(form.nbytes + 64, np.uint8))  # never touched: no memory
    data = data[-data.data_ptr() % 64 :][: form.nbytes]
    data[-last.nbytes :] = last.data
    whole = P.PackedWeight(data, form)
    got = P.gather(whole, torch.tensor([0, rows - 64, rows - 1]))
    expected = P.dequantize(last)
    assert same_bits(got[1:], expected[[0, 63]]) and not got[0].any()
    with pytest.raises(ValueError, match=f"{rows}"):
        P.gather(whole, torch.tensor([rows]))


# ---- threads, fork, Ctrl-C ----


def work(seed: int) -> list[torch.Tensor]:
    """A little of several rooms."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(96, 64, generator=rng)
    H = torch.zeros(64, 64)
    hessian.hessian_(H, X)
    keep = mask.keep_nm(mask.magnitude(X), 2, 4)
    packed = P.pack(*content("int4-mask", 70, 64, 32, seed=seed)[:2], kind="int4-mask", group=32)
    return [H, keep, packed.data, P.dequantize(packed), sqgemm.linear(X.bfloat16(), packed)]


def test_row_concurrent_callers_get_what_one_gets():
    """Eight threads, each with its own inputs: the bits of a lone caller, twenty times over."""
    alone = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            together = list(pool.map(work, range(8)))
            for one, other in zip(alone, together, strict=True):
                assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def test_row_a_forked_child_computes_instead_of_hanging(threads):
    expected = work(3)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a pool that was not copied would be waited for
        good = all(same_bits(a, b) for a, b in zip(work(3), expected, strict=True))
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(same_bits(a, b) for a, b in zip(work(3), expected, strict=True))


# ---- too few tokens for the columns ----


def test_row_too_few_tokens_for_the_rank_are_told_by_plan(tmp_path):
    """Before anything runs: fewer tokens than 4 per column, with the widest matrix named."""
    model, texts = save_model(tmp_path / "model"), save_texts(tmp_path / "texts", repeat=8)

    result = distaya(
        "plan", model, "--sparsity", "0.5", "--calib", texts, "--tokens", 240, "--window", 16,
        "--no-rehearsal", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = {each["module"]: each for each in json.loads(result.stdout)["ranks"] if each["sentence"]}
    assert set(told) == {"mlp.down_proj"}  # the others have 32 columns, and 128 tokens do
    for word in ("240 tokens", "64 columns", "256 or more"):
        assert word in told["mlp.down_proj"]["sentence"]
