"""A run as several ranks: bytes as the code passes them, seconds by the parts they are made of."""

import itertools
import json

import pytest
import tiny
import torch

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import compress
from distaya_ext.errors import UsageError
from distaya_ext.planning import factors, passed, plan, probe, scaling, wire
from distaya_ext.planning.clock import Rehearsal
from distaya_ext.planning.scaling import Costs, Work, simulate
from distaya_ext.planning.wire import Wire

REHEARSED = Rehearsal(0, 200, 2.0, 1.0, 0.001, 0.0001, 0.5, 2, 1e-6, 1e-9, 0.1, 0.4, 0.3, 0.0, 0.2)
WIRE = Wire(1e9, "given")


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """What the process that rehearses would say."""

    def ask(request):
        found = {"process": 400 << 20, "startup": 1.0}
        return found | ({"rehearsal": vars(REHEARSED)} if request["rehearse"] else {})

    monkeypatch.setattr(probe, "ask", ask)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("source") / "llama", tiny.FAMILIES["llama"])


# ---- seconds ----


def _simulated(source, worlds, *, work=None, wire=WIRE, windows=48, **fields):
    from distaya_ext.planning.plan import _job

    recipe = tiny.recipe(**fields)
    job = _job(recipe, open_checkpoint(source), tiny.windows(windows), torch.device("cpu"))
    costs = Costs({0: work, 1: work, 2: work}, 3.0, 1.0)
    return simulate(job, worlds, wire, costs), job


@pytest.fixture
def everywhere(monkeypatch):
    """Every layer is a kind of its own, so that costs for all of them are asked for."""
    kinds = {0: 1, 1: 1, 2: 1}
    monkeypatch.setattr(scaling, "layer_kinds", lambda checkpoint, plan: kinds)
    monkeypatch.setattr(scaling, "device_bytes", lambda *args: 1 << 20)


def test_every_part_is_shared_or_not_as_it_is_said(source, everywhere):
    work = Work(read=0.5, gather=0.25, token=0.001, factor=2.0, inverse=1.0, rows=6.0, train=0.002,
                write=0.125)  # fmt: skip
    found, _ = _simulated(source, [1, 2, 4], work=work, quality="plain", wire=Wire(1e15, "given"))
    for row, world in zip(found.rows, (1, 2, 4), strict=True):
        tokens = 48 // world * tiny.WINDOW
        expected = {
            "read": 0.5, "gather": 0.25 + 0.001 * tokens, "factor": 2.0, "rows": 6.0 / world,
            "train": 0.002 * tokens, "write": 0.125, "reduce": 0, "spread": 0, "gradients": 0,
            "inverse": {1: 1.0, 2: 0.5, 4: 0.3}[world],  # ten levels
        }  # fmt: skip
        assert row.parts == pytest.approx(expected, abs=1e-6)
        assert row.layer == pytest.approx(sum(expected.values()))
        assert row.seconds == pytest.approx(3 * row.layer + 3.0 + 1.0 / world)
        one = found.rows[0].seconds
        assert row.efficiency == pytest.approx(one / (world * row.seconds))
    assert found.rows[0].efficiency == 1.0
    assert "4 ranks take" in found.sentence and "factor" in found.sentence


def test_what_passes_costs_its_bytes_at_the_rate_of_the_wire(source, everywhere):
    fields = {"quality": "high", "nm": "2:4"}
    fast, job = _simulated(source, [2, 3], work=Work(), wire=Wire(2e6, "given"), **fields)
    slow, _ = _simulated(source, [2, 3], work=Work(), wire=Wire(1e6, "given"), **fields)
    for a, b, world in zip(fast.rows, slow.rows, (2, 3), strict=True):
        here, parts = passed.in_parts(job, world, None)
        moved = passed.of_layer(here, 0, parts)
        hops = {2: 1, 3: 2}[world]
        for kind, part in (("weights", "read"), ("moments", "reduce"), ("rows", "spread"),
                           ("inverses", "inverse"), ("gradients", "gradients")):  # fmt: skip
            assert 2 * a.parts[part] == pytest.approx(b.parts[part]) and a.parts[part] > 0
            assert b.parts[part] == pytest.approx(moved[kind].seconds(1e6, hops))
            assert b.bytes[kind] == (max(moved[kind].given), max(moved[kind].arrived))
    assert slow.rows[1].seconds > fast.rows[1].seconds


def test_a_gpu_reads_and_writes_beside_its_work(source, everywhere):
    _, job = _simulated(source, [1], work=Work())
    for work, layer in ((Work(read=1.0, rows=4.0, write=2.0), 4.0), (Work(rows=1, write=2), 2.0)):
        costs = Costs({0: work, 1: work, 2: work}, late=True)
        assert simulate(job, [1], WIRE, costs).rows[0].layer == layer


def test_more_ranks_never_shorten_what_is_not_shared(source):
    found = plan(
        source, tiny.recipe(), tiny.windows(64), ranks=[1, 2, 4, 8, 16, 32], network="100MB/s"
    )
    rows = found.scaling.rows
    for one, more in itertools.pairwise(rows):
        for part in ("gather", "rows"):
            assert more.parts[part] <= one.parts[part]
        for part in ("read", "factor", "write", "reduce", "spread"):
            assert more.parts[part] >= 0.999 * one.parts[part], part
        assert more.efficiency < one.efficiency
        assert more.read <= one.read and more.memory <= one.memory + (64 << 20)
    steps = found.time.steps
    whole = sum(steps[name] for name in ("start", "proof", "record", "layers", "write"))
    assert rows[0].seconds == pytest.approx(whole)


def test_methods_without_a_hessian_share_no_rows(source):
    found = plan(source, tiny.recipe("wanda"), tiny.windows(), ranks=[1, 4], network="1GB/s")
    one, four = found.scaling.rows
    assert four.bytes["rows"] == (0, 0) and four.bytes["weights"][0] > 0
    assert one.bytes == dict.fromkeys(passed.KINDS, (0, 0))


def test_a_rehearsal_tells_its_parts():
    work = REHEARSED.work(0.5)
    assert work.rows == pytest.approx(0.5 * (2.0 - 0.1 - 0.4 - 0.3 - 0.2))
    assert (work.read, work.factor, work.inverse, work.write) == (0.05, 0.2, 0.15, 0.1)
    assert work.seconds(1000) == pytest.approx(REHEARSED.of_layer(1000, 0.5))
    assert REHEARSED.of_layer(1000) == pytest.approx(2.0 + 1.0 + 0.001 * 800)
    nothing = Rehearsal(0, 200, 2.0, 1.0, 0.001, 0.0001, 0.5, 2, 1e-6, 1e-9)
    assert (nothing.work().factor, nothing.work().rows) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "wanda"}, (0, 0)),
        ({"quality": "plain"}, (1, 0)),
        ({"nm": "2:4", "bits": 4, "group": 32}, (1, 0)),
        ({"method": "gptq", "bits": 4, "group": 32, "order": "activation"}, (2, 0)),
        ({"nm": "2:4", "bits": 4, "group": 32, "quality": "high"}, (1, 10)),
    ],
    ids=str,
)
def test_factorisations_are_those_of_the_code(source, monkeypatch, fields, expected):
    """Counted while one stack is solved."""
    from distaya_ext.compress import solve
    from distaya_ext.compress.settings import from_recipe
    from distaya_ext.compress.statistic import Statistic
    from distaya_ext.ops import cholesky, refit

    settings = from_recipe(tiny.recipe(**fields))
    assert factors.factorisations(settings) == expected
    if settings.statistic != "hessian":
        return
    counts = {"factors": 0, "inverses": 0}

    def count(name, real):
        def counted(*args, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        return counted

    late = count("factors", cholesky.cholesky_late)
    for module in (cholesky, solve):  # not that of refit, which is counted as an inverse
        monkeypatch.setattr(module, "cholesky_late", late)
    monkeypatch.setattr(refit, "inverse_", count("inverses", refit.inverse_))
    statistic = Statistic("hessian", 64, torch.device("cpu"))
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    statistic.add(x)
    statistic.count(len(x))
    solve.solve([torch.randn(32, 64)], settings, statistic)
    assert tuple(counts.values()) == expected


def test_each_size_is_timed_once(source, monkeypatch):
    asked = []

    def seconds(columns, inverts):
        asked.append((columns, inverts))
        return 1.0, 10.0 * inverts

    monkeypatch.setattr(factors, "_seconds", seconds)
    from distaya_ext.compress.plan import make_plan

    checkpoint = open_checkpoint(source)
    made = make_plan(tiny.recipe(quality="high"), checkpoint, 3)
    assert factors.factoring(checkpoint, made, 0) == (4, 4 * 10 * 10)  # four stages
    assert asked == [(64, True), (96, True)]
    made = make_plan(tiny.recipe("wanda"), checkpoint, 3)
    assert factors.factoring(checkpoint, made, 0) == (0, 0)


def test_timing_a_factorisation():
    once, inverse = factors._seconds(64, inverts=True)
    assert 0 < once < inverse
    assert factors._seconds(64, inverts=False)[1] == 0


# ---- what is said, and refused ----


def test_json_and_notices(source):
    found = plan(source, tiny.recipe(), tiny.windows(), ranks=[1, 2], network="80Mbit/s")
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))["scaling"]
    assert told["kind"] == scaling.KIND and "simulated" in told["kind"]
    assert told["wire"] == {"bytes_per_second": 1e7, "source": "given"}
    assert [row["ranks"] for row in told["rows"]] == [1, 2]
    assert set(told["rows"][1]["parts"]) == set(scaling.PARTS)
    assert set(told["rows"][1]["bytes"]) == set(passed.KINDS)
    assert plan(source, tiny.recipe(), tiny.windows()).to_dict()["scaling"] is None


def test_what_is_not_in_it_is_said(source):
    from distaya_ext.planning.scaling import left_out

    chained = tiny.recipe(heal={"steps": 1}, drop_layers="1")
    assert left_out(chained, torch.device("cpu"), True) == [
        "of the compression alone: drop_layers, heal of the recipe not counted"
    ]
    (told,) = left_out(tiny.recipe(), torch.device("cuda"), True)
    assert "no seconds of GPUs" in told
    assert left_out(tiny.recipe(), torch.device("cuda"), False) == []


def test_without_a_rehearsal_bytes_and_memory_are_told(source):
    found = plan(
        source, tiny.recipe(), tiny.windows(), ranks=[2], network="1GB/s", rehearse=False
    ).scaling
    assert found.sentence is None and found.rows[0].seconds is None
    assert found.rows[0].sent > 0 and found.rows[0].memory > 400 << 20


def test_a_rank_holds_its_own_windows(source):
    few, many = (
        plan(source, tiny.recipe(), tiny.windows(n), ranks=[1, 2], network="1GB/s", rehearse=False)
        for n in (400, 800)
    )
    one, two = many.scaling.rows
    assert one.memory == many.memory.peak
    pieces = 4 * 4 * 96 * 96
    assert two.memory == few.memory.peak + pieces


def test_what_compress_refuses_is_refused_in_the_same_words(source, tmp_path):
    with pytest.raises(UsageError) as planned:
        plan(source, tiny.recipe(), tiny.windows(12), ranks=[2, 13], network="1GB/s")
    assert str(planned.value).startswith("13 processes were started, but the calibration has 12")
    recipe = tiny.recipe(calibration={"tokens": 1 << 20, "parts": 13})
    with pytest.raises(UsageError) as planned:
        plan(source, recipe, tiny.windows(12), ranks=[2], network="1GB/s")
    with pytest.raises(UsageError) as run:
        compress(source, tmp_path / "out", recipe, tiny.windows(12))
    assert str(planned.value) == str(run.value)


def test_refusals(source):
    for ranks, network in (([], "1GB/s"), ([0], "1GB/s"), ([2], "fast"), ([2], "0GB/s")):
        with pytest.raises(UsageError):
            plan(source, tiny.recipe(), tiny.windows(), ranks=ranks, network=network)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10GB/s", 1e10), ("2.5 GB/s", 2.5e9), ("1GiB/s", 2**30), ("100Gbit/s", 1.25e10), ("7B/s", 7)],
)
def test_rates(text, rate):
    assert wire.given(text).rate == rate


def test_a_wire_is_measured_between_two_processes():
    found = wire.measured()
    assert 1e6 < found.rate < 1e12 and "this host" in found.source


def test_the_command_shows_it(source):
    from typer.testing import CliRunner

    from bench.plan import TEXTS
    from distaya_ext.cli.app import app

    nano = str(TEXTS.parents[1] / "nano-aya")
    words = ["plan", nano, "--calib", str(TEXTS), "--sparsity", "2:4", "--tokens", "5888"]
    words += ["--window", "256", "--no-rehearsal"]
    found = CliRunner().invoke(app, [*words, "--ranks", "1, 2,8", "--wire", "10GB/s"])
    assert found.exit_code == 0, found.output
    for word in ("simulated", "GB/s", "given", "gradients"):
        assert word in found.stdout
    for flags in (["--ranks", "two"], ["--ranks", "0"], ["--ranks", ""], ["--wire", "1GB/s"]):
        assert CliRunner().invoke(app, [*words, *flags]).exit_code == 2, flags
    refused = CliRunner().invoke(app, [*words, "--ranks", "24", "--wire", "1GB/s"])
    assert refused.exit_code == 2 and "24 processes were started" in refused.stderr


def test_seconds_are_shown_where_there_are_some(source):
    from distaya_ext.cli import scaling as tables
    from distaya_ext.cli.output import console

    found = plan(source, tiny.recipe(), tiny.windows(), ranks=[1, 2], network="1GB/s").scaling
    screen = console()
    with screen.capture() as shown:
        for told in tables.tables(found):
            screen.print(told)
    for word in ("seconds of a layer", "factor", "efficiency", "simulated: 2 ranks take"):
        assert word in shown.get()
