"""A whole model of Aya-8B's exact shape, random weights, through the commands of a user.

    python bench/whole_model.py [--readme] [--folder DIR]       # 25 GB of disk, 21 GB of memory

It writes the model, then for each recipe runs `distaya compress` and `distaya bench model` against
the dense one, each in a process of its own whose peak of memory is read at its end. --readme
rewrites the table in README.md; the JSON goes to bench/results/whole_model.json. --layers, --model:
smaller, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoTokenizer, CohereConfig  # noqa: E402

import distaya_ext  # noqa: E402
from distaya_ext.measure.shapes import MODELS, Model  # noqa: E402

TOKENIZER = Path(distaya_ext.__file__).parent / "assets" / "nano-aya"
CLI = [sys.executable, "-c", "from distaya_ext.cli.app import main; main()"]
RECIPES = {
    "int4 + int8 embedding (rtn)": [
        "--method", "rtn", "--quality", "plain", "--bits", "4", "--embed-bits", "8",
    ],
    "2:4 + int4 + int8 embedding (magnitude)": [
        "--method", "magnitude", "--quality", "plain", "--sparsity", "2:4", "--bits", "4",
        "--embed-bits", "8",
    ],
}  # fmt: skip


def make(folder: Path, sizes: Model, layers: int) -> None:
    """Write the model shard by shard; a layer at a time is in memory."""
    CohereConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.ff,
        num_hidden_layers=layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, tie_word_embeddings=True, dtype="bfloat16",
        bos_token_id=2, eos_token_id=3, pad_token_id=0, architectures=["CohereForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(1 << 20, generator=random)).to(torch.bfloat16)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        """Random weights repeated from the pool, at another offset each time."""
        start = int(torch.randint(len(pool), (), generator=random))
        again = pool.roll(start).repeat(-(-rows * cols // len(pool)))
        return again[: rows * cols].clone().view(rows, cols)

    index: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    h, ff, kv = sizes.hidden, sizes.ff, sizes.kv
    norm = torch.ones(h, dtype=torch.bfloat16)
    shard(
        "ends.safetensors",
        {"model.embed_tokens.weight": matrix(sizes.vocab, h), "model.norm.weight": norm},
    )
    linears = {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h), "mlp.gate_proj": (ff, h), "mlp.up_proj": (ff, h),
        "mlp.down_proj": (h, ff),
    }  # fmt: skip
    for layer in range(layers):
        above = f"model.layers.{layer}"
        tensors = {f"{above}.{name}.weight": matrix(*size) for name, size in linears.items()}
        tensors[f"{above}.input_layernorm.weight"] = norm
        shard(f"layer-{layer:02d}.safetensors", tensors)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def command(*words: object) -> tuple[dict, float, int]:
    """What `distaya WORDS --json` prints, its seconds, and its peak of resident bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        child = subprocess.Popen([*CLI, *map(str, words), "--json", "--quiet"], stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"distaya {words[0]} failed with exit code {child.returncode}")
        out.seek(0)
        found = json.load(out)
    return found, time.perf_counter() - start, usage.ru_maxrss * 1024


def run(folder: Path, sizes: Model, layers: int) -> dict:
    """Everything as JSON; says what it does."""
    dense, rows = folder / "dense", []
    print("writing the model", flush=True)
    make(dense, sizes, layers)
    for name, flags in RECIPES.items():
        packed = folder / "packed"
        _, seconds, peak = command("compress", dense, "--out", packed, "--overwrite", *flags)
        print(f"{name}: compressed in {seconds:.0f} s, {peak / 2**30:.1f} GiB at most", flush=True)
        bench, _, _ = command("bench", "model", packed, "--against", dense)
        for row, what in zip(bench["rows"], (name, "bf16"), strict=True):
            row["name"] = what  # not a path of this machine
        rows.append({"name": name, "seconds": seconds, "peak": peak, "bench": bench})
        print(line(rows[-1]), flush=True)
    return {"machine": harness.machine(), "layers": layers, "sizes": vars(sizes), "rows": rows}


def line(row: dict) -> str:
    ours, dense = row["bench"]["rows"]
    ratios = row["bench"]["ratios"]
    mark = " (contended)" if row["bench"]["contended"] else ""
    cells = [
        row["name"] + mark,
        f"{row['seconds']:.0f} s",
        f"{row['peak'] / 2**30:.1f} GiB",
        f"{ours['nbytes'] / 2**30:.1f} of {dense['nbytes'] / 2**30:.1f} GiB",
        f"{ours['prefill_rate']:.1f} / {dense['prefill_rate']:.1f} ({ratios['prefill']:.2f}x)",
        f"{ours['decode_rate']:.1f} / {dense['decode_rate']:.1f} ({ratios['decode']:.2f}x)",
    ]
    return "| " + " | ".join(cells) + " |"


def text(found: dict) -> str:
    head = ["weights", "compressed in", "at a peak of", "resident, of bf16's"]
    head += ["prefill tokens/s, ours / bf16", "decode tokens/s, ours / bf16"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *map(line, found["rows"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    parser.add_argument("--folder", type=Path, help="where the models are written for a while")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--model", default="aya-8b", choices=MODELS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = run(Path(folder), MODELS[args.model], args.layers)
    print(text(found))
    if args.readme:
        path = ROOT / "bench" / "results" / "whole_model.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        harness.write_table(ROOT / "README.md", "whole", text(found))


if __name__ == "__main__":
    main()
