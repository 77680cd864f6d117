"""bench/gpu.py as far as it can be tested without a GPU: its logic, its cases at tiny shapes."""

import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import gpu, gpu_case, gpu_cases, gpu_clock, gpu_measure, gpu_report, gpu_sections

ROOT = Path(gpu.__file__).resolve().parent.parent
TINY = gpu_case.Size(hidden=128, ff=256, tokens=192, device="cpu")
FAR = time.time() + 1e6


def tiny_case(**changes):
    """A case whose ours and ruler agree, unless `changes` says otherwise."""
    parts = {
        "ours": lambda x: x + 1,
        "rulers": {"torch": lambda x: 1 + x},
        "inputs": gpu_case.rotated(torch.ones(4)),
        "work": {"fp32": 1e-3, "copy": 1e-6},
        "difference": gpu_case.relative,
        "limit": 0.0,
    }
    return gpu_case.Case(**(parts | changes))


def row_of(**changes):
    return gpu_measure.measure("row", tiny_case(**changes), gpu_clock.Clock("cpu"), FAR, 4)


# ---- arguments ----


@pytest.mark.parametrize(
    ("argv", "sections"),
    [
        ([], [n for n in gpu.BUDGETS if n != "build"]),
        (["--build"], list(gpu.BUDGETS)),
        (["--only", "obs,hessian"], ["ceilings", "hessian", "obs"]),
        (["--only", "mask", "--skip", "ceilings"], ["mask"]),
        (["--only", "tests"], ["tests"]),
        (["--only", "whole,tests"], ["tests", "whole"]),
        (
            ["--skip", "tests,obs,whole"],
            ["sanitize", "ceilings", *(r for r in gpu.ROOMS if r != "obs")],
        ),
        (["--device", "cpu", "--quick"], ["ceilings", *gpu.ROOMS, "whole"]),
    ],
)
def test_sections_chosen(argv, sections):
    args = gpu.arguments(argv)
    assert args.sections == sections
    assert args.build == ("build" in sections)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only", "obs,nosuch"], "no section named nosuch; there are build, tests"),
        (["--device", "cpu"], "needs --quick"),
        (["--device", "cpu", "--quick", "--build"], "need a GPU"),
        (["--device", "cpu", "--quick", "--only", "tests"], "tests, sanitize need a GPU"),
        (["--quick", "--readme"], "no figures for --readme"),
        (["--minutes", "0"], "must be more than 0"),
        (["--only", "tests", "--skip", "tests"], "nothing is left"),
    ],
)
def test_wrong_arguments_are_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.arguments(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_budgets_fit_into_nine_minutes():
    assert gpu.MINUTES == 9

    def needed(minutes):
        share = gpu.budgets(minutes)
        return sum(max(share[name] for name in group) for group in gpu.groups(list(share)))

    assert needed(gpu.MINUTES) + 20 <= 9 * 60
    assert needed(3) == pytest.approx(needed(gpu.MINUTES) / 3)
    assert gpu.groups(["tests", "mask", "whole"]) == [["tests"], ["mask"], ["whole"]]
    assert gpu.groups(["tests", "sanitize", "obs"]) == [["tests", "sanitize"], ["obs"]]


def test_without_a_gpu_one_sentence_and_exit_code_3(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 3
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("There is no GPU to measure: torch ")
    assert out.err.count("\n") == 1


# ---- cases ----


def test_a_section_for_every_room():
    rooms = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} - {"core"}
    assert set(gpu.ROOMS) == rooms
    assert set(gpu.BUDGETS) == rooms | {"build", "tests", "sanitize", "ceilings", "whole"}


def test_aya_shapes_and_every_op_are_listed(capsys):
    assert gpu.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    wanted = ["column_sq_ 14336", "symmetrize_ 14336", "hessian_ 4096 x 8192 bf16"]
    wanted += ["hessian_ 14336 x 8192 bf16", "quantize 4096x4096 int4"]
    wanted += [f"{op} {n}" for op in ("factor", "inverse_factor", "inverse") for n in (4096, 14336)]
    modes = ("50 %", "2:4", "2:4 + int4")
    wanted += [f"sweep_ {rows}x4096, {mode}" for rows in (4096, 14336) for mode in modes]
    wanted += [f"{method} 4096x14336" for method in ("magnitude", "wanda", "ria")]
    wanted += [f"keep_nm 4096x14336 2:4 {along}" for along in ("inputs", "outputs")]
    wanted += [f"keep_k 4096x14336 half, {along}" for along in ("row", "column", "matrix")]
    wanted += [
        f"dequantize 14336x4096 {kind}" for kind in ("int4", "int4-2:4", "int4-mask", "int8")
    ]
    wanted += [f"sweep_ {size}, 2:4 + int4" for size in ("34816x4096", "4096x14336")]
    wanted += ["pack 14336x4096 int4"]
    wanted += [f"cross_ {size} x 8192 bf16" for size in ("4096x4096", "4096x14336")]
    stacks = ("4096x4096", "34816x4096", "4096x14336")
    wanted += [f"{op} {n}" for op in ("solve_", "multiply_", "admm_", "refit") for n in stacks]
    wanted += ["admm 4096x4096 2:4, 30 iterations"]
    wanted += ["gate_up 14336x4096 bf16", "moments_ 14336 x 8192 bf16 silu"]
    wanted += [f"balance 14336x4096 {nm}, one round" for nm in ("2:4", "4:8")]
    wanted += ["similarity 8192 x 4096 bf16", "divergence 256000x4096 bf16, 3 x 1024"]
    wanted += [f"linear 256000x4096 int8, {m}" for m in (1, 8, 16, 64)]
    products = ["glu 28672x4096"]
    products += [f"linear {n}" for n in ("34816x4096", "6144x4096", "4096x14336", "4096x18432")]
    tokens = (1, 8, 16, 32, 64, 128, 512, 2048)
    wanted += [
        f"{p} {kind}, {m}" for p in products for kind in ("int4", "int4-2:4") for m in tokens
    ]
    others = ("int3", "int4-mask", "int4-out", "int8")
    wanted += [f"linear 34816x4096 {kind}, {m}" for kind in others for m in (1, 16, 64)]
    assert [name for name in wanted if f"  {name}" not in out] == []
    assert len(wanted) == sum(line.startswith("  ") for line in out.splitlines())


@pytest.mark.parametrize("section", gpu.ROOMS)
def test_every_case_agrees_with_its_rulers(section):
    rows = []
    table = gpu_cases.cases(section, TINY)
    clock = gpu_clock.Clock("cpu")
    assert gpu_measure.measure_all(table, clock, 0.0, lambda record: rows.append(record["row"]))
    assert [row["name"] for row in rows] == list(table)
    for row in rows:
        assert row["difference"] <= row["limit"]
        assert row["ours"]["runs"] == 1 and "1 of 15 repeats" in row["note"]
        assert all(amount > 0 for amount in row["work"].values())


def test_inputs_rotate_beyond_the_cache():
    few, many = (gpu_case.rotated(torch.zeros(n)) for n in (1 << 26, 8))
    assert (len(few), len(many)) == (2, 4)
    assert len({x.data_ptr() for (x,) in many}) == 4


def test_weights_of_products_pass_the_cache_four_times():
    for nbytes in (10 << 20, 46 << 20, 1 << 30):
        copies = gpu_case.copies(nbytes, "cpu")
        assert copies * nbytes >= 4 * gpu_case.CACHE > (copies - 1) * nbytes or copies == 2
    case = gpu_cases.cases("sqgemm", TINY)["linear 704x128 int4, 8"]()
    assert case.graph and len(case.inputs) == gpu_case.MOST
    own = {weight.data.data_ptr() for _, (weight,), *_ in case.inputs}
    dense = {W.data_ptr() for _, _, W, *_ in case.inputs}
    assert len(own) == len(dense) == gpu_case.MOST


# ---- measuring ----


def test_rulers_run_in_every_third_turn():
    row = row_of()
    assert (row["ours"]["runs"], row["rulers"]["torch"]["runs"]) == (4, 2)
    assert "error" not in row and "note" not in row


@pytest.mark.parametrize("off", [2.0, math.nan])
def test_a_wrong_result_is_an_error(off):
    row = row_of(ours=lambda x: x + off)
    assert "off torch; at most 0e+00 is right" in row["error"]
    json.dumps(row, allow_nan=False)


def test_a_failing_ruler_does_not_cost_our_figure():
    def broken(x):
        raise RuntimeError("no such operator")

    row = row_of(rulers={"torch": lambda x: x + 1, "other": broken})
    assert row["error"] == "other: RuntimeError: no such operator"
    assert row["difference"] == 0.0 and list(row["rulers"]) == ["torch"]
    row = row_of(rulers={"torch": broken})
    assert "could not be compared" in row["error"] and row["ours"]["runs"] == 4


def test_a_failing_case_leaves_the_others():
    def broken():
        raise MemoryError(f"no room under {ROOT}/bench")

    rows = []
    table = {"one": broken, "two": tiny_case}
    clock = gpu_clock.Clock("cpu")
    assert not gpu_measure.measure_all(table, clock, FAR, lambda r: rows.append(r["row"]))
    assert rows[0] == {"name": "one", "error": "MemoryError: no room under ./bench"}
    assert "error" not in rows[1]


def test_a_lost_device_is_left_to_another_process(monkeypatch):
    def lost():
        if rows and rows[-1]["name"] == "b, 64":
            raise RuntimeError("an illegal memory access was encountered")

    rows = []
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    clock = gpu_clock.Clock("cpu")
    clock.cuda = True
    monkeypatch.setattr(clock, "seconds", lambda call, arguments: 1.0)
    table = {"a, 8": tiny_case, "b, 64": tiny_case, "c, 128": tiny_case}

    def tell(record):
        rows.append(record["row"])

    with pytest.raises(gpu_measure.Lost, match="lost in b, 64") as error:
        gpu_measure.measure_all(table, clock, FAR, tell)
    argv = gpu_measure.going_on(error.value, ["sqgemm", "--until", "9"])
    assert argv == ["sqgemm", "--until", "9", "--no-wgmma", "--first", "2"]
    assert gpu_measure.going_on(error.value, ["pack"]) == ["pack", "--first", "2"]
    few = gpu_measure.Lost(1, "a, 8")
    assert gpu_measure.going_on(few, ["sqgemm"]) == ["sqgemm", "--first", "1"]
    rows.clear()
    assert gpu_measure.measure_all(table, clock, FAR, tell, first=2)
    assert [row["name"] for row in rows] == ["c, 128"]


def test_what_follows_a_lost_device_says_so(tmp_path):
    """A real process that goes on behind the last row but one, on the CPU."""
    into, last = tmp_path / "rows", len(gpu_cases.cases("sqgemm", gpu_case.size(True, "cpu"))) - 1
    command = [*gpu_sections.measuring("sqgemm", "cpu", True), "--until", "0", "--into", str(into)]
    more = ["--no-wgmma", "--first", str(last)]
    assert subprocess.run([*command, *more], capture_output=True).returncode == 1
    (row,) = (json.loads(line)["row"] for line in into.read_text().splitlines())
    assert "ours" in row and row["note"].endswith("; without warpgroup products")


class Event:
    """A CUDA event as far as Clock uses it; every call takes 2 ms."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        calls.append("event")

    def synchronize(self):
        calls.append("wait")

    def elapsed_time(self, end):
        assert end is not self
        return 2.0


calls = []


def test_gpu_calls_are_queued_behind_a_filler_and_timed_by_events(monkeypatch):
    class Properties:
        L2_cache_size = 1 << 10

    class Filler:
        def zero_(self):
            calls.append("filler")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: Filler())
    clock = gpu_clock.Clock("cuda")
    calls.clear()
    assert clock.seconds(lambda x: calls.append(x), ("call",)) == pytest.approx(2e-3)
    assert calls == ["filler", "event", "call", "event", "wait"]
    monkeypatch.setattr(clock, "seconds", lambda call, arguments: call(*arguments) or 4e-4)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    calls.clear()
    timer = clock.graph(lambda x: calls.append(x), [("a",), ("b",), ("c",)])
    # one to see how long it takes, two to warm up, then 2 ms of calls and no input left out
    assert calls == ["a", "a", "b", "begin", *"abcabc", "end"]
    assert timer(0) == pytest.approx(4e-4 / 6) and calls[-1] == "replay"

    def broken(_x):
        if "begin" in calls:
            raise RuntimeError("not while capturing")

    calls.clear()
    with pytest.raises(RuntimeError, match="not while capturing"):
        clock.graph(broken, [("a",)])
    assert calls == ["begin", "end"]  # a capture that is left open would break all later ones
    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenGraph)
    calls.clear()
    with pytest.raises(RuntimeError, match="not while capturing"):
        clock.graph(broken, [("a",)])


class Graph:
    """A CUDA graph as far as Clock uses it."""

    def capture_begin(self):
        calls.append("begin")

    def capture_end(self):
        calls.append("end")

    def replay(self):
        calls.append("replay")


class BrokenGraph(Graph):
    """What went wrong while capturing is told at its end once more, in words that say less."""

    def capture_end(self):
        raise RuntimeError("operation failed due to a previous error during capture")


class Stream:
    def wait_stream(self, other):
        assert other is not self


def test_smoke_test_from_end_to_end(tmp_path, capfd):
    """Tiny shapes on the CPU through real processes; nothing goes to bench/results by itself."""
    before = sorted(gpu_report.RESULTS.glob("*")) if gpu_report.RESULTS.exists() else []
    out = tmp_path / "smoke.json"
    assert gpu.main(["--device", "cpu", "--quick", "--only", "mask", "--out", str(out)]) == 0
    body = json.loads(out.read_text())
    assert body["facts"]["smoke"] and body["facts"]["torch"] == torch.__version__
    assert set(body["ceilings"]) == {"copy", "bf16", "fp32"}
    assert [s["status"] for s in body["sections"]] == ["ok", "ok"]
    assert str(ROOT) not in out.read_text()
    assert "SMOKE TEST" in capfd.readouterr().out
    assert before == (sorted(gpu_report.RESULTS.glob("*")) if gpu_report.RESULTS.exists() else [])


@pytest.mark.cuda
def test_smoke_test_on_the_gpu(tmp_path):
    out = tmp_path / "smoke.json"
    assert gpu.main(["--quick", "--only", "hessian", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["facts"]["capability"]
