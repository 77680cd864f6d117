"""The border every tensor crosses, and the machine it crosses into."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from distaya_ext import doctor
from distaya_ext.ops import machine

GOOD = torch.zeros(4, 5)


def python(code: str, **env: str) -> str:
    """Run code in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def touch(bad) -> int:
    return machine.touch(GOOD, bad, GOOD, GOOD)


def test_sizes_cross_the_border():
    assert touch(torch.zeros(3, 0)) == 60
    assert touch(torch.zeros(())) == 61
    assert touch(torch.zeros(2, 3, dtype=torch.bfloat16)[:, 1:]) == 64


def test_more_than_2_31_elements_are_counted():
    huge = torch.zeros(1, dtype=torch.uint8).expand(2**31 + 7)
    assert touch(huge) == 2**31 + 67


KNOWN_DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8"]


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in [*KNOWN_DTYPES, "bool"]])
def test_known_dtypes_cross(dtype):
    assert touch(torch.zeros(2, 2, dtype=dtype)) == 64


def test_requires_grad_is_refused():
    with pytest.raises(ValueError, match=r"float32 \[2, 3\] on cpu\) requires grad.*detach"):
        touch(torch.nn.Parameter(torch.zeros(2, 3)))
    assert touch(torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False)) == 66


def test_fake_tensors_are_refused():
    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(ValueError, match="3 elements has no data"):
        touch(fake)


def test_meta_and_sparse_tensors_are_refused():
    for bad in (torch.zeros(3, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(ValueError, match="no memory a kernel could read"):
            touch(bad)


def test_unknown_dtypes_are_refused_with_their_code():
    with pytest.raises(ValueError, match="type code 5 with 64 bits"):
        touch(torch.zeros(3, dtype=torch.complex64))


@pytest.mark.parametrize("bad", [None, 3, [1.0], "tensor"])
def test_what_is_no_tensor_is_refused(bad):
    with pytest.raises(TypeError):
        touch(bad)


def test_torch_threads_reach_the_kernels():
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert machine.threads() == n
    finally:
        torch.set_num_threads(before)


def test_one_openmp_runtime_is_loaded():
    code = (
        "from distaya_ext import doctor; import torch; torch.set_num_threads(1);"
        "from distaya_ext.ops import machine;"
        "assert len(doctor._openmp_runtimes()) == 1, doctor._openmp_runtimes();"
        "assert machine.threads() == 1"
    )
    python(code)


def test_isa_can_be_lowered_and_comes_back():
    before = machine.isa()
    with machine.use_isa("portable"):
        assert machine.isa() == "portable"
    assert machine.isa() == before
    with (
        pytest.raises(ValueError, match="'sse9' must be portable, avx2 or avx512"),
        machine.use_isa("sse9"),
    ):
        pass


def test_isa_from_the_environment():
    code = "from distaya_ext.ops import machine; print(machine.isa())"
    assert python(code, DISTAYA_ISA="portable").strip() == "portable"


def test_peaks_are_measured(isa):
    peak = machine.peak()
    assert peak["fp32"] > 1
    assert (peak["bf16_dot"] > 0) == (peak["int8_dot"] > 0) == (isa == "avx512")


def test_doctor_reports_every_section():
    report = doctor.report()
    assert set(report) == {"versions", "cpu", "gpu", "kernels", "slow paths"}
    assert report["cpu"]["instruction set"].startswith(machine.isa())
    assert all(value for section in report.values() for value in section.values())


def test_import_starts_nothing():
    code = (
        "import distaya_ext, distaya_ext.ops.machine, sys, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert 'transformers' not in sys.modules"
    )
    python(code)


def test_reading_reads_everything(threads):
    """The xor of the 64-byte lines, by torch; a tail below a line is left out."""
    words = torch.randint(-(2**63), 2**63 - 1, (3 << 18,), dtype=torch.int64)
    t = torch.cat([words.view(torch.uint8), torch.ones(9, dtype=torch.uint8)])
    expected = int(np.bitwise_xor.reduce(words.numpy().view(np.uint64)))
    assert machine.read(t) == expected
    assert machine.read(t[:0]) == 0
    with pytest.raises(ValueError, match="must be uint8 but is float32"):
        machine.read(torch.ones(64))
