"""fork(): a pool of threads does not survive it, and neither does CUDA."""

import subprocess
import sys
from pathlib import Path

TESTS = str(Path(__file__).resolve().parent)

# The parent uses the pool in every room. The child must get the same bits, and must get them: with
# the parent's pool it would wait forever for threads that were not copied.
CHILD = """
import multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from every_op import CASES, same
from distaya_ext.ops import machine

torch.set_num_threads(3)
calls = {name: make(0, 4) for name, make in CASES.items()}
expected = {name: call() for name, call in calls.items()}
assert machine.threads() == 3

def wrong():
    assert machine.threads() == 1
    return [name for name, call in calls.items() if not same(call(), expected[name])]

if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(1 if wrong() else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
else:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = [pool.apply_async(wrong) for _ in range(4)]
        assert [f.get(timeout=20) for f in found] == [[]] * 4
assert machine.threads() == 3  # the parent keeps its pool
assert [n for n, call in calls.items() if not same(call(), expected[n])] == []
print("fine")
"""

LOST = """
import os, sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cuda_sim.simulator import obtain

sim = obtain().module
W, S = torch.randn(8, 32), torch.empty(8, 32)
score = lambda: sim.mask_score(W, "magnitude", None, 0.0, None, S)
score()
child = os.fork()
if child == 0:
    try:
        score()
    except ValueError as e:
        os._exit(0 if "forked after CUDA was used" in str(e) and "spawn" in str(e) else 3)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
score()
print("fine")
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, TESTS, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_forked_child_computes_the_same_with_one_thread():
    assert run(CHILD, "fork").splitlines()[-1:] == ["fine"]


def test_multiprocessing_by_fork_works():
    assert run(CHILD, "pool").splitlines()[-1:] == ["fine"]


def test_cuda_in_a_forked_child_is_one_sentence(simulator):
    assert run(LOST).splitlines()[-1:] == ["fine"]
