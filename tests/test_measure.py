"""What `distaya bench` measures: rulers that multiply, ratios that add up, clocks that tell."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from distaya_ext.cli.app import app
from distaya_ext.errors import ResourceError, UsageError
from distaya_ext.measure import clock, kernels, layer, limits, report, rulers, shapes
from distaya_ext.measure.shapes import Model, Shape
from distaya_ext.ops import pack

CPU = torch.device("cpu")
SMALL = Shape("small", 192, 256)
STREAMED = 1 << 16


def plan(**changes):
    fields = {
        "shapes": [SMALL],
        "kinds": ["int4", "int4-2:4"],
        "tokens": [1, 3],
        "threads": [1],
        "streamed": STREAMED,
    }
    return kernels.Plan(**(fields | changes))


@pytest.fixture
def quick(monkeypatch):
    """Short samples and a small read: the numbers are not looked at for their size."""
    monkeypatch.setattr(kernels, "_SAMPLE", 1e-4)
    monkeypatch.setattr(kernels, "_RUNS", 2)
    found = limits.Limits(threads=1, read=40.0, int8=1000.0, bf16=500.0, fp32=250.0)
    monkeypatch.setattr(limits.Machine, "at", lambda self, threads: found)
    monkeypatch.setattr(limits.Machine, "peaks", lambda self: None)
    monkeypatch.setattr(limits, "cache_bytes", lambda device: STREAMED)


class Clock:
    """Stands for clock.sample: runs, and says that each subject took what is given here."""

    def __init__(self, seconds, contended=()):
        self.seconds, self.contended = seconds, contended

    def __call__(self, run, inputs, threads, kept=None):
        value = run(*inputs)
        if kept is not None:
            kept.append(value)
        subject = getattr(run, "subject", None)  # the plain read of memory has none
        name, calls = (subject.name, run.calls) if subject else ("memory read", 1)
        wall = self.seconds.get(name, 1.0) * calls
        return clock.Sample(wall, wall, wall if name in self.contended else 0.0, threads)


# ---- shapes ----


def test_the_matrices_of_aya_by_name():
    sizes = {s.name: (s.rows, s.cols) for s in shapes.of_model("aya-8b")}
    assert sizes == {
        "aya-8b gate/up": (14336, 4096),
        "aya-8b down": (4096, 14336),
        "aya-8b q/o": (4096, 4096),
        "aya-8b k/v": (1024, 4096),
        "aya-8b qkv+gate+up": (34816, 4096),
        "aya-8b head": (256000, 4096),
    }
    layers = {"aya-8b": 32, "aya-32b": 40, "tiny-aya": 36}
    billions = {"aya-8b": 8.03, "aya-32b": 32.3, "tiny-aya": 3.35}  # published sizes
    for name, count in layers.items():
        of = {s.name.removeprefix(f"{name} "): s.weights for s in shapes.of_model(name)}
        total = count * (of["qkv+gate+up"] + of["q/o"] + of["down"]) + of["head"]
        assert total / 1e9 == pytest.approx(billions[name], rel=0.003)


def test_shapes_are_found_by_parts_of_names_and_by_sizes():
    assert [s.name for s in shapes.find(["8b down"])] == ["aya-8b down"]
    assert [s.name for s in shapes.find(["down", "aya-8b down"])] == [
        "aya-8b down",
        "aya-32b down",
        "tiny-aya down",
    ]
    (own,) = shapes.find(["96x160"])
    assert (own.rows, own.cols, own.head) == (96, 160, False)
    for wrong in ("upside", "0x5", "9999999x9999999"):
        with pytest.raises(UsageError, match=wrong):
            shapes.find([wrong])


# ---- what competes ----


@pytest.mark.parametrize("kind", pack.KINDS)
@pytest.mark.parametrize("rows, cols", [(64, 128), (1030, 256)])
def test_random_codes_fit_their_kind(kind, rows, cols):
    shape = Shape("x", rows, cols)
    packed = rulers.random_packed(shape, kind, CPU)  # pack refuses a pattern that is violated
    codes, _, _ = pack.unpack(packed)
    bits = {"int3": 3, "int8": 8}.get(kind, 4)
    pruned = (codes == 1 << (bits - 1)).float().mean()
    assert int(codes.max()) < 1 << bits
    if kind in ("int4-2:4", "int4-out", "int4-mask"):
        assert 0.5 <= pruned < 0.6  # half, and those whose code is the zero by chance
    else:
        assert pruned < 0.2


@pytest.mark.parametrize("kind", pack.KINDS)
def test_ours_compute_what_the_weights_say(kind):
    x = torch.randn(5, SMALL.cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = rulers.ours(SMALL, kind, rulers.MODES, STREAMED, CPU)
    assert [s.name for s in found] == [kind, f"{kind} exact"]
    for subject in found:
        assert rulers.check(subject, x) == rulers.error(subject, x) < 0.04
        assert len(subject.copies) * subject.nbytes >= STREAMED
        assert len({c.data.data_ptr() for c in subject.copies}) == len(subject.copies)
    errors = [rulers.error(s, x) for s in found]
    assert errors[1] < errors[0], "int8 activations cost something"


def test_a_wrong_kernel_is_not_timed(monkeypatch, quick):
    right = rulers.sqgemm.linear
    monkeypatch.setattr(rulers.sqgemm, "linear", lambda x, w, exact: 1.2 * right(x, w, exact=exact))
    with pytest.raises(RuntimeError, match=r"kernel int4 on 192x256 with 1 tokens is off by 0\.2"):
        kernels.measure(plan())


def test_rulers_are_torchs_own_products():
    found = {s.name: s for s in rulers.rulers(SMALL, ["int4", "int8"], STREAMED, CPU)}
    assert list(found) == ["torch bf16", "torch int4", "torch int8"]
    x = torch.eye(SMALL.cols).bfloat16()
    W = found["torch bf16"].call(x, found["torch bf16"].copies[0]).t()
    assert torch.equal(W, found["torch bf16"].copies[0])
    codes = found["torch int8"].copies[0]
    got = found["torch int8"].call(x, codes).t().float()
    torch.testing.assert_close(got, codes.float() * 0.01, rtol=0.01, atol=0)
    packed, grid = found["torch int4"].copies[0]
    got = found["torch int4"].call(x, (packed, grid)).t().float()
    scale = grid[..., 0].t().float().repeat_interleave(rulers.GROUP, 1)
    zero = grid[..., 1].t().float().repeat_interleave(rulers.GROUP, 1)
    codes = (got - zero) / scale  # whole numbers -8..7, but for what bf16 rounds
    sure = scale > 0.5
    assert (codes[sure] - codes[sure].round()).abs().max() < 0.1
    assert codes[sure].round().unique().tolist() == list(range(-8, 8))


def test_rulers_that_cannot_take_a_shape_are_left_out():
    assert [s.name for s in rulers.rulers(Shape("x", 65, 130), ["int4", "int8"], 1, CPU)] == [
        "torch bf16"
    ]
    assert len(rulers.rulers(SMALL, ["int8"], 1, CPU)) == 2
    head = Shape("head", 256, 128, head=True)
    assert rulers.kinds_of(head, ["int4", "int8"]) == ["int8"]
    (ours,) = rulers.ours(head, "int8", ["a8"], 1, CPU)
    assert ours.copies[0].format.group == 0
    with pytest.raises(UsageError, match="kind 'int5' is none of int4, int3"):
        rulers.kinds_of(head, ["int5"])


# ---- numbers ----


def test_ratios_rates_and_limits_on_a_stubbed_clock(monkeypatch, quick):
    spent = {"torch bf16": 8e-3, "torch int4": 3e-3, "int4": 2e-3, "int4-2:4 exact": 4e-3}
    spent["memory read"] = 0.5
    monkeypatch.setattr(clock, "sample", Clock(spent))
    seen = []
    result = kernels.measure(plan(), on_row=seen.append)
    assert seen == result.rows and result.contended == []
    names = ["torch bf16", "torch int4", "int4", "int4 exact", "int4-2:4", "int4-2:4 exact"]
    assert [(r.tokens, r.name) for r in result.rows] == [(t, n) for t in (1, 3) for n in names]
    rows = {(r.tokens, r.name): r for r in result.rows}
    row = rows[3, "int4"]
    assert row.seconds == pytest.approx(2e-3)
    assert row.ratios == {"torch bf16": pytest.approx(4), "torch int4": pytest.approx(1.5)}
    assert row.gops == pytest.approx(2 * 3 * 192 * 256 / 2e-3 / 1e9)
    assert row.gbs == pytest.approx(row.nbytes / 2e-3 / 1e9)
    assert (row.bound, row.least) == ("memory", pytest.approx(row.nbytes / 40e9))
    assert row.reached == pytest.approx(row.least / 2e-3)
    assert row.read == pytest.approx(limits.Machine(CPU).read_bytes / 0.5e9)
    assert report.share(row).endswith(f"({100 * row.gbs / row.read:.0f} %)")
    assert rows[1, "torch int4"].ratios["torch int4"] == pytest.approx(1)
    assert rows[1, "int4"].error is not None and rows[1, "torch bf16"].error is None


def test_which_limit_binds():
    found = limits.Limits(threads=2, read=40.0, int8=1000.0, bf16=500.0, fp32=None)
    assert found.seconds(40_000_000, 1e8, "int8") == (pytest.approx(1e-3), "memory")
    assert found.seconds(40_000_000, 1e10, "int8") == (pytest.approx(1e-2), "compute")
    assert found.seconds(40_000_000, 1e10, "fp32")[1] == "memory", "an unknown peak binds nothing"
    line = limits.describe(found)
    assert line == "2 threads: memory read 40 GB/s, int8 peak 1000 GOP/s, bf16 peak 500 GOP/s"


def test_rows_are_held_against_the_last_limits(monkeypatch, quick):
    """A better limit that is seen later holds for the rows before it too."""
    monkeypatch.setattr(clock, "sample", Clock({"int4": 2e-3}))
    seen = iter([10.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr(
        limits.Machine, "at", lambda self, threads: limits.Limits(threads, next(seen), *[None] * 3)
    )
    early = []
    result = kernels.measure(plan(), on_row=early.append)
    row = next(r for r in result.rows if r.name == "int4")
    assert row.least == pytest.approx(row.nbytes / 40e9)
    assert early[2].least == pytest.approx(4 * row.least)


def test_limits_are_measured():
    before = torch.get_num_threads()
    with clock.threads_kept():
        machine = limits.Machine(CPU, nbytes=4 << 20)
        found = machine.at(1)
        machine.peaks()
        later = machine.at(1)
    assert torch.get_num_threads() == before
    pairs = zip(vars(found).values(), vars(later).values(), strict=True)
    assert all(b >= a for a, b in pairs if a is not None), "the best that was seen"
    assert 0.1 < found.read < 10000 and found.fp32 > 0.1
    assert limits.cache_bytes(CPU) >= 1 << 20 and limits.free_bytes(CPU) > 1 << 20


def test_contended_rows_are_flagged_and_told(monkeypatch, quick):
    monkeypatch.setattr(clock, "sample", Clock({}, contended=("int4",)))
    result = kernels.measure(plan())
    assert {(r.name, r.contended) for r in result.rows if r.name.startswith("int4 ")} == {
        ("int4 exact", False)
    }
    assert [r.name for r in result.contended] == ["int4", "int4"]
    assert "(contended)" in report.markdown(result.rows, ["torch bf16", "int4"])
    assert report.kernels_json(result)["contended"] == 2


def test_a_contended_ruler_spoils_every_ratio(monkeypatch, quick):
    monkeypatch.setattr(clock, "sample", Clock({}, contended=("torch int4",)))
    assert all(r.contended for r in kernels.measure(plan(tokens=[1])).rows)


def test_rows_above_their_limit_are_told(monkeypatch, quick):
    monkeypatch.setattr(clock, "sample", Clock({"int4": 1e-7}))
    said = []
    kernels.measure(plan(tokens=[1]), on_note=said.append)
    assert said[-1].startswith("1 of 6 rows are faster than the limits say")


def test_weights_are_rotated():
    used = []
    subject = rulers.Subject("x", 10, "int8", ["a", "b", "c"], lambda x, w: used.append(w) or x)
    rotation = kernels.Rotation(subject, torch.zeros(1, 1))
    rotation.calls = 2
    for _ in range(3):
        rotation()
    assert used == ["a", "b", "c", "a", "b", "c"]
    assert len(rulers.copies_of("w", 10, 41, str)) == 5
    assert rulers.copies_of("w", 100, 41, str) == ["w"]


def test_what_does_not_fit_is_told(monkeypatch, quick):
    monkeypatch.setattr(limits, "free_bytes", lambda device: 1 << 30)
    said = []
    big = Shape("big", 1 << 15, 1 << 15)
    result = kernels.measure(plan(shapes=[big, SMALL], tokens=[1]), on_note=said.append)
    assert {r.shape for r in result.rows} == {"small"}
    assert any(n.startswith("big left out: it needs") and "1.0 GiB are free" in n for n in said)
    with pytest.raises(ResourceError, match="nothing could be measured"):
        kernels.measure(plan(shapes=[big]))


# ---- what is said ----


def test_json_and_tables_of_a_true_run(quick):
    result = kernels.measure(plan(kinds=list(pack.KINDS), tokens=[2]))
    body = json.loads(json.dumps(report.kernels_json(result), allow_nan=False))
    assert {"version", "bench", "machine", "limits", "notes", "contended", "rows"} == set(body)
    assert len(body["rows"]) == 3 + 2 * len(pack.KINDS)
    for row in body["rows"]:
        numbers = [row[k] for k in ("seconds", "gbs", "gops", "least", "reached")]
        numbers += row["ratios"].values()
        assert all(math.isfinite(n) and n > 0 for n in numbers), row
    columns = ["torch bf16", "torch int4", "int4", "int4-2:4", "nosuch"]
    lines = report.markdown(result.rows, columns).splitlines()
    assert lines[0].startswith(
        "| 1 thread, ms | tokens | torch bf16 | torch int4 | int4 | int4-2:4"
    )
    assert lines[0].endswith("| int4, of the limit | int4 x bf16 | int4 x int4 |")
    assert {line.count("|") for line in lines if line} == {10}


def test_a_layer_decodes_packed_and_dense():
    sizes = Model(hidden=128, ff=256, heads=4, kv_heads=2, vocab=8)
    rows = layer.measure("tiny", ["int4", "int4-mask"], [1], 1 << 16, sizes=sizes, steps=2)
    assert [r.name for r in rows] == ["dense bf16", "int4", "int4-mask"]
    dense, packed, _ = rows
    weights = 128 * (128 * 2 + 64 * 2 + 256 * 3)
    assert dense.nbytes == 2 * (weights + 128) and dense.times_dense == 1
    assert packed.nbytes < 0.3 * dense.nbytes
    assert packed.times_dense == pytest.approx(dense.seconds / packed.seconds)
    assert all(math.isfinite(r.tokens_per_second) and r.tokens_per_second > 0 for r in rows)
    assert "int4-mask" in report.layer_lines(rows)[2]


def test_a_layer_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(ResourceError, match=r"aya-32b layer needs .* GiB of memory and 1\.0 GiB"):
        layer.measure("aya-32b", ["int4"], [1], 1)


# ---- the command ----


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_bench_alone_means_kernels(quick):
    result = bench("--shape", "192x256", "--kind", "int4", "--tokens", "1,2", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert "192x256" in result.stdout and "torch int4" in result.stdout
    assert "192x256, 1 thread, 2 tokens, int4 exact: " in result.stderr
    again = bench("kernels", "--shape", "192x256", "--tokens", 1, "--json", "--quiet")
    body = json.loads(again.stdout)
    assert again.stderr == "" and {r["tokens"] for r in body["rows"]} == {1}


def test_bench_layer(monkeypatch, quick):
    monkeypatch.setitem(shapes.MODELS, "tiny-aya", Model(128, 256, 4, 2, 8))
    flags = ("layer", "--size", "tiny-aya", "--kind", "int4", "--threads", 1, "--exact")
    body = json.loads(bench(*flags, "--json").stdout)
    assert [r["name"] for r in body["rows"]] == ["dense bf16", "int4", "int4 exact"]
    assert body["bench"] == "layer" and body["rows"][0]["times_dense"] == 1
    assert "x dense bf16" in bench(*flags).stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--shape", "sideways"], ["'sideways'", "ROWSxCOLS"]),
        (["--kind", "int5"], ["'int5'", "int4-2:4"]),
        (["--tokens", "1,x"], ["--tokens", "'1,x'"]),
        (["--tokens", "0"], ["--tokens", "not 0"]),
        (["--threads", "-1"], ["--threads", "not -1"]),
        (["--full", "--quick"], ["--full", "--quick"]),
        (["--device", "tpu"], ["'tpu'"]),
        (["--sparse"], ["--sparse"]),
        (["models"], ["models"]),
        (["layer", "--size", "aya"], ["'aya'", "aya-8b"]),
        (["layer", "--kind", "int5"], ["'int5'"]),
        (["model", "m", "--new", "0"], ["--new"]),
        (["model"], ["path", "bench model --help"]),
    ],
)
def test_bench_bad_usage(flags, words):
    result = bench(*flags)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert all(word in line for word in words), line
