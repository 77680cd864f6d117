"""What plan() says of memory and time beside a real run, each in processes of their own."""

from pathlib import Path

import pytest

from bench import plan as bench
from distaya_ext import Recipe, plan

CLOSE = 0.15  # of the measured peak
CASES = {
    "nano-aya": ({"method": "sparsegpt", "nm": "2:4", "bits": 4}, None),
    "made": ({"method": "gptq", "bits": 4, "quality": "plain", "embed_bits": 8},
             (512, 1024, 2, 64000)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_near_the_measured_one(tmp_path, name):
    fields, sizes = CASES[name]
    model = bench.NANO if sizes is None else bench.make(tmp_path / name, sizes)
    calibration = {"path": str(bench.TEXTS), "tokens": 5888, "window": 256}
    recipe = Recipe(model=str(model), **fields, calibration=calibration)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    planned = plan(model, recipe, rehearse=name == "nano-aya")
    measured, seconds = bench.measure(model, tmp_path / "recipe.yaml", tmp_path / "out")
    print(f"{planned.memory.peak / 2**20:.0f} MiB predicted, {measured / 2**20:.0f} measured")
    assert planned.memory.peak == pytest.approx(measured, rel=CLOSE), planned.memory.phases
    files = sum(path.stat().st_size for path in Path(tmp_path / "out").glob("*.safetensors"))
    assert files <= planned.output <= 1.01 * files + 4096
    if planned.time is not None:  # other work on the machine decides how near it comes
        assert 0.1 * seconds < planned.time.seconds < 10 * seconds
