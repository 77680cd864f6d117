"""Peak resident memory does not grow with the number of layers."""

import os
import subprocess
import sys
from pathlib import Path

import tiny
from transformers import LlamaConfig

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import budget

# One layer weighs 13 MiB in fp32 beside some 500 MiB for Python, torch and transformers: 18 more
# layers, held, would be 234 MiB and show.
_SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
}

_RUN = """
import sys
import tiny
from distaya_ext.compress import compress

model, out, limit = sys.argv[1:]
report = compress(model, out, tiny.recipe("wanda", max_ram=limit), tiny.windows(8, 32, 512))
assert report.proof.kind == "truncated" and report.spilled, report
with open("/proc/self/status") as file:  # ru_maxrss would include the parent's peak
    print(next(line for line in file if line.startswith("VmHWM")).split()[1])
"""


def peak_mib(folder: Path, layers: int) -> float:
    source = tiny.make(folder / f"layers{layers}", LlamaConfig(num_hidden_layers=layers, **_SIZES))
    limit = f"{budget.least_bytes(open_checkpoint(source))}B"
    command = [sys.executable, "-c", _RUN, str(source), str(folder / f"out{layers}"), limit]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1]) / 1024


def test_24_layers_take_at_most_1_3_times_the_memory_of_6(tmp_path):
    few, many = peak_mib(tmp_path, 6), peak_mib(tmp_path, 24)
    print(f"peak resident memory: {few:.0f} MiB for 6 layers, {many:.0f} MiB for 24")
    assert many <= 1.3 * few, f"{many:.0f} MiB for 24 layers, {few:.0f} MiB for 6"
