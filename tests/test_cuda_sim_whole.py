"""No CUDA kernel is left out. Comes after the rooms' files, whose launches it counts."""

import re

import pytest
from cuda_sim.build import ROOT


def kernels() -> set[str]:
    """Names declared __global__ in csrc."""
    found = set()
    for path in sorted((ROOT / "csrc").rglob("*.cu*")):
        text = re.sub(r"//.*", "", path.read_text())
        text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text)
        found |= set(re.findall(r"__global__\s+void\s+(\w+)\s*\(", text))
    return found


def test_every_instantiation_of_every_kernel_ran(request, simulator):
    rooms = {p.name for p in ROOT.glob("tests/test_cuda_sim_*.py")}
    chosen = {item.path.name for item in request.session.items}
    if not rooms <= chosen or request.session.config.option.keyword:
        pytest.skip("counts what all tests/test_cuda_sim_*.py launched; not all of them were run")
    names = kernels()
    assert len(names) > 30
    compiled = {f for f in simulator.functions() if re.split("<", f)[0].split("::")[-1] in names}
    assert {re.split("<", f)[0].split("::")[-1] for f in compiled} == names
    missing = sorted(compiled - simulator.launched())
    assert missing == [], f"{len(missing)} kernels never ran:\n" + "\n".join(missing)
