"""How bench/gpu.py runs its sections: whatever becomes of one, the others run and it is told."""

import sys
import time
from pathlib import Path

import pytest
import torch

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import gpu, gpu_report, gpu_sections

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
    args = gpu.arguments(["--device", "cpu", "--quick", "--skip", "pack,sqgemm"])
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
    monkeypatch.setattr(gpu_sections, "device_arch", lambda: "90a-real")
    monkeypatch.setattr(gpu_sections, "build", fail)
    assert gpu.main(["--build"]) == 1
    assert "build: exit code 1: no nvcc for 90a-real" in capsys.readouterr().err


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


def test_pytest_is_judged_by_its_closing_line(monkeypatch):
    ends = {0: "", 1: "FAILED tests/test_x.py::test_y - AssertionError"}
    for code, line in ends.items():
        monkeypatch.setattr(
            gpu_sections,
            "PYTEST",
            f"print({line!r}); print('= 3 in 1s ='); raise SystemExit({code})",
        )
        section = gpu_report.Section("tests")
        gpu_sections.tests(section, 30, gpu_sections.environment(False))
        assert section.status == ("failed" if code else "ok")
        assert section.said == "3 in 1s" + ("; FAILED tests/test_x.py::test_y" if code else "")
