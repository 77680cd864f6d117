"""Shared by all tests: GPU tests run only where a GPU is; every instruction set can be chosen."""

import os
import shutil

import pytest
import torch

from distaya_ext.ops import machine

# Child interpreters find what this one finds, wherever they are started.
os.environ["PYTHONPATH"] = os.pathsep.join(
    os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path
)


os.environ["DISTAYA_HISTORY"] = "off"  # what tests do is no part of anybody's history


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Away from the sources, also for fixtures that many tests share: `python -c` would pick them
    up, unbuilt as they are.
    """
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def away_from_the_source(tmp_path, monkeypatch) -> None:
    """Run every test in its own folder."""
    monkeypatch.chdir(tmp_path)


def gpu_ready() -> bool:
    """A GPU that both torch and this build's kernels can use."""
    return torch.cuda.is_available() and machine.cuda_status()["status"] == "ok"


def pytest_report_header() -> str | None:
    """Says it also where processes of pytest-xdist collect, whose counts nobody prints."""
    return None if gpu_ready() else "no GPU: tests marked cuda are deselected"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect (and count as deselected) GPU tests on a machine without a GPU.

    Asking for them by name (``-m cuda``) without a GPU is an error, not a silent success.
    """
    if gpu_ready():
        return
    if config.option.markexpr == "cuda":
        raise pytest.UsageError(
            "pytest -m cuda needs a GPU: torch.cuda.is_available() is "
            f"{torch.cuda.is_available()} and the kernels say: {machine.cuda_status()['status']}"
        )
    kept, dropped = [], []
    for item in items:
        (dropped if item.get_closest_marker("cuda") else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A kernel that takes the device with it would fail every test behind it in this process.

    Under pytest-xdist the process ends instead, the test counts as failed, and another process
    takes over.
    """
    if item.get_closest_marker("cuda") and os.environ.get("PYTEST_XDIST_WORKER"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def available_isas() -> list[str]:
    """Instruction sets this CPU can run, worst first."""
    return list(machine.ISAS[: machine.ISAS.index(machine.best_isa()) + 1])


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest):
    """Runs the test once per instruction set this CPU offers."""
    with machine.use_isa(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    """Runs the test with 1 and with 2 threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def simulator():
    """The CUDA kernels on the CPU (tests/cuda_sim/README.md), built once and kept by content."""
    from cuda_sim.simulator import obtain

    return obtain()


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """A folder with a small model and texts, nothing wrong with either; only to be copied."""
    from speaking import save_model, save_texts

    root = tmp_path_factory.mktemp("healthy")
    save_model(root / "model", seed=1)
    save_texts(root / "texts", repeat=8)
    return root


@pytest.fixture
def place(healthy, tmp_path):
    """A copy of it for one test to damage."""
    return shutil.copytree(healthy, tmp_path / "place")
