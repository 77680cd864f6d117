"""y = x W^T on packed weights at the matrices of the Aya models, next to torch's own products.

Every shape by name, every kind, 1 to 2048 tokens: choose with -k, e.g. -k "aya-8b and down and
m16". Weights come from memory (as many copies as four times the last cache); the columns are
seconds of one call. Beside each, from one alternating run of everything at that shape and number of
tokens: GB/s, GOP/s, the limit of the machine, and how many times faster than each ruler it is.
For one thread: OMP_NUM_THREADS=1.
"""

import pytest
import torch

from distaya_ext.measure import clock, kernels, limits, rulers, shapes
from distaya_ext.ops import pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {s.name.replace(" ", "-"): s for name in shapes.MODELS for s in shapes.of_model(name)}
MODES = ["exact"] if DEVICE.type == "cuda" else rulers.MODES


@pytest.fixture(scope="session")
def limit():
    """Of the machine, measured once."""
    return limits.Machine(DEVICE).at(torch.get_num_threads())


@pytest.fixture(scope="module")
def field(limit):
    """(shape, tokens) -> what competes there and its rows; the weights of one shape at a time."""
    held = {}

    def get(name, tokens):
        if held.get("name") != name:
            held.clear()
            held.update(name=name, subjects=subjects(SHAPES[name]), rows={})
        if tokens not in held["rows"]:
            x = torch.randn(tokens, SHAPES[name].cols, device=DEVICE).bfloat16()
            with torch.inference_mode():
                rows = kernels.rows(SHAPES[name], held["subjects"], x, limit)
            held["rows"] = {tokens: (x, {row.name: row for row in rows})}
        return held["subjects"], *held["rows"][tokens]

    return get


def subjects(shape):
    streamed = 4 * limits.cache_bytes(DEVICE)
    kinds = rulers.kinds_of(shape, pack.KINDS)
    need, free = kernels.needed_bytes(shape, kinds, streamed), limits.free_bytes(DEVICE)
    if need > free:
        pytest.fail(f"{shape.name} needs {need >> 20} MiB of memory and {free >> 20} are free")
    found = rulers.rulers(shape, kinds, streamed, DEVICE)
    for kind in kinds:
        found += rulers.ours(shape, kind, MODES, streamed, DEVICE)
    return found


def cases():
    """Every subject of every shape by name."""
    for name, shape in SHAPES.items():
        kinds = rulers.kinds_of(shape, pack.KINDS)
        ours = [rulers.name_of(kind, mode) for kind in kinds for mode in MODES]
        for tokens in shapes.TOKENS:
            for subject in (*rulers.ruler_names(shape, kinds, DEVICE), *ours):
                yield pytest.param(name, tokens, subject, id=f"{name}-m{tokens}-{subject}")


@pytest.mark.parametrize(("shape", "tokens", "name"), cases())
def test_sqgemm(benchmark, field, shape, tokens, name):
    """Seconds of a call on the CPU, of a CUDA graph of a call on every copy on a GPU."""
    found, x, rows = field(shape, tokens)
    subject = next(s for s in found if s.name == name)
    rotation = kernels.rotation(subject, x)
    with torch.inference_mode(), clock.threads_kept():
        rotation.calibrate()  # a round lasts 20 ms or one call
        once = len(subject.copies) if x.is_cuda else 1
        rounds, rotation.calls = rotation.calls // once, once
        benchmark.pedantic(rotation, rounds=5, iterations=rounds)
    row = rows[name]
    benchmark.extra_info |= {
        "ms": round(row.seconds * 1e3, 4),
        "GB/s": round(row.gbs, 1),
        "GOP/s": round(row.gops),
        "of the limit": f"{100 * row.reached:.0f} % ({row.bound})",
        "threads": row.threads,
        "contended": row.contended,
    } | {f"x {ruler}": round(ratio, 2) for ruler, ratio in row.ratios.items()}
