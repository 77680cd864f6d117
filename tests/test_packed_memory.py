"""Loading a packed folder takes the memory of the packed model, never that of a dense one."""

import os
import subprocess
import sys
from pathlib import Path

import packed_folders
import tiny
import torch
from packed_folders import w4
from transformers import LlamaConfig

# 24 layers of 3.4 million weights: 326 MiB dense in fp32, 163 in bf16, 45 packed.
_CONFIG = LlamaConfig(
    num_hidden_layers=24,
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1536,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=256,
)

# Growth of the peak between a first load, of a small model, and the load of the big one; and the
# largest tensor of floating point that any operation made meanwhile.
_RUN = """
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import distaya_ext
from transformers import AutoModelForCausalLM

class Largest(TorchDispatchMode):
    bytes = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.empty:
            return out  # the skeleton's, given back before anything is written into it
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and not t.is_meta and t.is_floating_point():
                Largest.bytes = max(Largest.bytes, t.numel() * t.element_size())
        return out

def status(field):
    with open("/proc/self/status") as file:  # ru_maxrss would include the parent's peak
        return int(next(line for line in file if line.startswith(field)).split()[1]) / 1024

way, small, big = sys.argv[1:]
load = distaya_ext.load if way == "ours" else AutoModelForCausalLM.from_pretrained
load(small)
before = status("VmRSS")
with Largest():
    model = load(big)
print(status("VmHWM") - before, Largest.bytes / 2**20, distaya_ext.resident_bytes(model) / 2**20)
"""


def test_the_peak_is_that_of_the_packed_model(tmp_path):
    small = tiny.make(tmp_path / "small", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    small, _ = packed_folders.write(small, tmp_path / "small-out", w4(), method="distaya")
    big = tiny.make(tmp_path / "big", _CONFIG, dtype=torch.bfloat16)
    big, _ = packed_folders.write(big, tmp_path / "big-out", w4(128), method="distaya")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    for way in ("ours", "plain"):
        command = [sys.executable, "-c", _RUN, way, str(small), str(big)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        growth, largest, resident = map(float, run.stdout.split())
        print(f"{way}: peak +{growth:.0f} MiB, largest float {largest:.1f}, model {resident:.0f}")
        assert resident < 50
        # Beside the model: one matrix being decoded (a few bytes per weight, 0.8 million weights).
        assert growth <= resident + 30, way
        # No matrix was ever dense: the largest float is the embedding, 512 x 512 in 2 bytes.
        assert largest <= 512 * 512 * 2 / 2**20, way
