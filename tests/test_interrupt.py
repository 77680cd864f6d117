"""Ctrl-C ends a long kernel between two of its blocks, not when all is done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = str(Path(__file__).with_name("interrupted.py"))


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, float | None]]:
    done = subprocess.run(
        [sys.executable, CHILD], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "op", ["cholesky", "inverse", "solve", "hessian", "cross", "sweep", "refit", "divergence"]
)
def test_a_long_kernel_is_interrupted(answers, op):
    """The exception leaves the kernel itself, 50 ms and a block after the signal at most."""
    late, whole = answers[op]["late"], answers[op]["whole"]
    assert late is not None, f"{op} ran to its end of {whole:.2f} s"
    assert late < 0.5 * whole + 0.05, answers[op]
