"""How bench/gpu.py runs its sections: whatever becomes of one, the others run and it is told."""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import gpu, gpu_checks, gpu_measure, gpu_report, gpu_sanitize, gpu_sections

ROOT = Path(gpu.__file__).resolve().parent.parent
ROW = '{"row": {"name": "first", "error": "too slow"}}'
SCRIPTS = {
    "ceilings": 'tell(\'{"ceilings": {"copy": 2.0}}\')',
    "hessian": f"tell('{ROW}'); import os, signal; os.kill(os.getpid(), signal.SIGABRT)",
    "cholesky": "raise SystemExit('out of luck')",
    "obs": "import time; time.sleep(60)",
    "mask": 'tell(\'{"row": {"name": "fine"}}\'); tell(\'{"row\')',
}


def pretend(section, device, quick):
    """A stand-in for gpu_measure.py that ends as SCRIPTS says."""
    tell = "import sys\ndef tell(s): open(sys.argv[-1], 'a').write(s + '\\n')\n"
    return [sys.executable, "-c", tell + SCRIPTS[section]]


def test_sections_survive_each_other(monkeypatch):
    short = {"ceilings": 1, "hessian": 1, "cholesky": 1, "obs": 1, "mask": 6}
    args = gpu.arguments(
        ["--device", "cpu", "--quick", "--skip", "refit,dass,influence,pack,sqgemm,whole"]
    )
    monkeypatch.setattr(gpu, "BUDGETS", short)
    report, saved, begin = gpu_report.Report(), [], time.monotonic()
    gpu.run(args, report, begin + 13, lambda: saved.append(len(report.sections)), pretend)
    assert time.monotonic() - begin < 13
    assert saved == [1, 2, 3, 4, 5]
    assert report.ceilings == {"copy": 2.0}
    by = {s.name: s for s in report.sections}
    assert [name for name, s in by.items() if s.status == "ok"] == ["ceilings", "mask"]
    assert by["hessian"].said == "the process was ended by SIGABRT (rows measured: 1)"
    assert by["cholesky"].said == "exit code 1: out of luck (rows measured: 0)"
    assert by["obs"].said.startswith("stopped at ")
    assert by["mask"].rows == [{"name": "fine"}]
    assert "hessian: first: too slow" in report.failures
    assert len(report.failures) == 4


def test_no_section_starts_when_the_time_is_over():
    args = gpu.arguments(["--device", "cpu", "--quick", "--only", "mask"])
    report = gpu_report.Report()
    gpu.run(args, report, time.monotonic(), command=pretend)
    assert [s.said for s in report.sections] == ["no time was left of 9 minutes"] * 2


def test_the_source_tree_does_not_hide_a_new_build(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:elsewhere")
    assert gpu_sections.environment(True)["PYTHONPATH"] == "elsewhere"
    assert gpu_sections.environment(False)["PYTHONPATH"] == f"{ROOT}:elsewhere"


def test_a_failed_build_ends_the_run(monkeypatch, capsys):
    def fail(section, limit, arch):
        section.status, section.said = "failed", f"exit code 1: no nvcc for {arch}"

    monkeypatch.setattr(gpu, "no_gpu", lambda: "")
    monkeypatch.setattr(gpu_sections, "lacking", lambda build: [])
    monkeypatch.setattr(gpu_sections, "device_arch", lambda: "90a-real")
    monkeypatch.setattr(gpu_sections, "build", fail)
    assert gpu.main(["--build"]) == 1
    assert "build: exit code 1: no nvcc for 90a-real" in capsys.readouterr().err


def test_what_is_not_installed_is_told_before_a_build(monkeypatch, capsys):
    def absent(name):
        asked.append(name)
        if name in ("pydantic", "pybind11"):
            raise metadata.PackageNotFoundError(name)

    asked = []
    monkeypatch.setattr(gpu, "no_gpu", lambda: "")
    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setattr(gpu_sections, "build", None)
    assert gpu.main(["--build"]) == 3
    said = "pybind11>=3 and pydantic>=2.7 must be installed first.\n"
    assert capsys.readouterr().err == f"Nothing was measured: {said}"
    assert {"torch", "transformers", "scikit-build-core", "huggingface_hub"} <= set(asked)
    assert gpu_sections.lacking(build=False) == ["pydantic>=2.7"]


def test_programs_of_the_toolkit_are_found_without_a_path(monkeypatch, tmp_path):
    program = tmp_path / "bin" / "no-such-compiler"
    program.parent.mkdir()
    program.touch(0o755)
    assert gpu_sections.tool(program.name) is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_sections.tool(program.name) == str(program)


PIP = """  error: subprocess-exited-with-error
  -- Looking for a CUDA compiler - NOTFOUND
  CMake Error at CMakeLists.txt:64 (message):
    DISTAYA_CUDA=ON but no CUDA compiler (nvcc) was found
  note: This error originates from a subprocess, and is likely not a problem with pip.
ERROR: Failed to build one or more wheels"""


def test_a_failed_build_names_its_cause():
    assert gpu_sections.cause(PIP.splitlines()) == [
        "CMake Error at CMakeLists.txt:64 (message): "
        "DISTAYA_CUDA=ON but no CUDA compiler (nvcc) was found"
    ]
    nvcc = ["[3/9] Building CUDA", "a.cu(7): error: expected a ;", "    int x", "FAILED: [code=2]"]
    assert gpu_sections.cause(nvcc) == ["a.cu(7): error: expected a ; int x"]
    assert gpu_sections.cause(["No module named pip"]) == ["No module named pip"]


def test_the_build_names_device_and_compiler(monkeypatch):
    def child(command, limit, env, show):
        seen.update(env, command=command)
        return 1, PIP.splitlines()

    seen = {}
    monkeypatch.setattr(gpu_sections, "child", child)
    monkeypatch.setattr(gpu_sections.shutil, "which", lambda name: f"bin/{name}")
    section = gpu_report.Section("build")
    gpu_sections.build(section, 9.0, "86-real")
    assert (seen["CUDAARCHS"], seen["DISTAYA_CUDA"]) == ("86-real", "ON")
    assert "--config-settings=cmake.define.CMAKE_CUDA_COMPILER=bin/nvcc" in seen["command"]
    assert "--config-settings=build-dir=build/gpu-86-real" in seen["command"]
    assert section.status == "failed" and section.said.endswith("(nvcc) was found")


@pytest.mark.parametrize(
    "capability", [(8, 6, "86"), (9, 0, "90a"), (10, 0, "100a"), (12, 0, "120")]
)
def test_the_build_is_for_the_present_device(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[:2])
    assert gpu_sections.device_arch() == f"{capability[2]}-real"


@pytest.mark.parametrize(
    ("built", "status", "said"),
    [
        (False, "ok", "built without CUDA kernels; --build makes them"),
        (True, "driver too old", "cannot use the GPU: driver too old"),
        (True, "ok", None),
    ],
)
def test_facts_say_why_a_gpu_cannot_be_used(monkeypatch, built, status, said):
    from distaya_ext.ops import machine

    monkeypatch.setattr(machine, "has_cuda", lambda: built)
    monkeypatch.setattr(machine, "cuda_status", lambda: {"status": status})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    known = gpu_measure.facts("cuda", quick=False)
    assert (said is None) == ("refusal" not in known)
    if said:
        assert said in known["refusal"]
    else:
        assert (known["device"], known["capability"]) == ("NVIDIA H200", "9.0")


def test_pytest_is_judged_by_its_closing_line(monkeypatch):
    ends = {0: "", 1: "FAILED tests/test_x.py::test_y - AssertionError"}
    for code, line in ends.items():
        monkeypatch.setattr(
            gpu_checks,
            "PYTEST",
            f"print('2.50s call     tests/test_x.py::test_z'); print({line!r}); "
            f"print('= 3 in 1s ='); raise SystemExit({code})",
        )
        section = gpu_report.Section("tests")
        gpu_checks.tests(section, 30, gpu_sections.environment(False))
        assert section.status == ("failed" if code else "ok")
        failed = "; FAILED tests/test_x.py::test_y" if code else ""
        assert section.said == f"3 in 1s{failed}; slowest: test_x.py::test_z 2.50s"


def test_the_files_with_gpu_tests_are_found():
    names = {Path(f).name for f in gpu_checks.gpu_test_files()}
    assert {"test_sqgemm_api.py", "test_hessian.py", "test_pack_cuda.py"} <= names
    assert "test_house.py" not in names


def test_the_whole_model_is_told_how_long_it_may_take(monkeypatch):
    def child(command, limit, env):
        seen.append(command)
        return 0, []

    seen = []
    monkeypatch.setattr(gpu_sections, "child", child)
    args = gpu.arguments(["--device", "cpu", "--quick", "--only", "whole", "--skip", "ceilings"])
    gpu.run(args, gpu_report.Report(), time.monotonic() + 100)
    (command,) = seen
    assert command[1].endswith("gpu_whole.py") and "--quick" in command
    assert 85 <= float(command[command.index("--limit") + 1]) <= 90


def test_rows_of_the_whole_model_are_taken_however_they_are_written():
    row = {"name": "all", "seconds": 3.0}
    lines = '{"row": {"name": "one"}}\n{"facts": {"x": 1}}\n{"na'
    assert gpu_sections.records(lines) == [{"row": {"name": "one"}}, {"facts": {"x": 1}}]
    for text in (json.dumps(row), json.dumps([row]), json.dumps({"rows": [row]}, indent=1)):
        assert gpu_sections.records(text) == [{"row": row}]
    assert gpu_sections.records("") == []


# ---- compute-sanitizer ----

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors"
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at syrk_kernel+0x410 and Read access
=========     at syrk_kernel+0x4a0 [24 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""
CLEAN_RACE = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed")


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (0, f"hessian\n{CLEAN}", "racecheck clean"),
        (0, CLEAN_RACE, "racecheck clean"),
        (9, RACE, "racecheck found: Error: Race reported between Write"),
        (1, f"RuntimeError: lost\n{CLEAN}", "racecheck failed: exit code 1: RuntimeError: lost"),
        (0, "hessian", "racecheck failed: it said nothing that can be read"),
        (None, "hessian", "racecheck failed: stopped at 30 s"),
    ],
)
def test_a_sanitizer_is_judged_by_its_summary(code, text, said):
    assert gpu_checks.verdict("racecheck", code, text.splitlines(), 30).startswith(said)


def test_the_four_tools_run_and_one_finding_fails_the_section(monkeypatch):
    finding = []

    def child(command, limit, env, show):
        tool = command[command.index("--tool") + 1]
        assert command[-1].endswith("gpu_sanitize.py") and env["PYTORCH_NO_CUDA_MEMORY_CACHING"]
        assert ("kernel_substring=distaya" in command) == (tool != "initcheck")
        return (9, RACE.splitlines()) if tool in finding else (0, CLEAN.splitlines())

    monkeypatch.setattr(gpu_checks, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_checks, "child", child)
    for found, status in (("no tool", "ok"), ("racecheck", "failed")):
        finding.append(found)
        section = gpu_report.Section("sanitize")
        gpu_checks.sanitize(section, 30, {})
        assert section.status == status and section.said.startswith("memcheck clean; racecheck ")


def test_a_missing_sanitizer_is_a_failed_section(monkeypatch):
    monkeypatch.setattr(gpu_checks, "sanitizer", lambda: None)
    section = gpu_report.Section("sanitize")
    gpu_checks.sanitize(section, 30, {})
    assert section.failures == [
        "sanitize: compute-sanitizer was not found; it comes with the CUDA toolkit or with "
        "pip install nvidia-cuda-sanitizer-api-cu12"
    ]


class Seen(TorchDispatchMode):
    """Notes which of our ops are called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


seen = set()


def test_the_sanitizers_see_every_op():
    everything = {
        name.split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("distaya::")
    }
    with torch.no_grad(), Seen():
        for room in gpu_sanitize.ROOMS.values():
            room(gpu_sanitize.Inputs("cpu"))
    assert len(everything) >= 15 and everything - seen == set()
    assert set(gpu_sanitize.ROOMS) == set(gpu.ROOMS)
