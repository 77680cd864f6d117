"""A whole model of Aya-8B's shape compressed on one GPU, and the textbook route beside it.

    python bench/gpu_whole.py --into FILE [--layers 32] [--samples 128] [--tokens 2048] [--quick]

Writes random weights of that shape, the same in every layer, to memory (or a temporary folder),
then runs compress(): joint 2:4 + int4, random tokens, one proof, everything streamed. Each finding
is a JSON line in FILE: the whole run at quality plain with its peak of GPU memory and the seconds
of each phase; one layer by the textbook PyTorch route, whose extrapolation to all layers is called
one; and the whole run at quality default with what is left of the time. When the time is up, a run
stops after a layer and its line says so.
`--device cpu --quick` tries the script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import torch  # noqa: E402

from bench import textbook  # noqa: E402
from bench.gpu_phases import Phases  # noqa: E402
from distaya_ext.compress import compress, events  # noqa: E402
from distaya_ext.measure.shapes import MODELS, Model  # noqa: E402
from distaya_ext.recipe import Recipe  # noqa: E402

QUICK = Model(hidden=128, ff=256, heads=4, kv_heads=2, vocab=640)
GROUP = 128
# The bars of gpu_bars.py (60 s, and the peak of memory) belong to the first: their floor counts one
# stream of hidden states, one moment and one sweep per stack, the published algorithm. Quality
# default carries the dense stream, too, gathers a cross moment, refits and sweeps again: it has a
# row and no bar.
BARRED, SECOND = "plain", "default"


class Enough(Exception):
    """Raised out of the run when its time is up."""


def place(needed: int) -> str | None:
    """A folder in memory where it has room for so many bytes, else None: the system's own."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > needed else None


def model_bytes(sizes: Model, count: int) -> int:
    """Of the dense model in bf16."""
    linears = 2 * sizes.hidden * (sizes.hidden + sizes.kv) + 3 * sizes.hidden * sizes.ff
    return 2 * (count * linears + sizes.vocab * sizes.hidden)


def repeat_layer(folder: Path, count: int) -> None:
    """Make a model of one layer one of `count` layers that hold the same weights.

    Only headers differ, so the files are copied, which is much faster than making weights anew.
    """
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = "model.layers.0."
    names = [name for name in index["weight_map"] if name.startswith(first)]
    source = folder / index["weight_map"][names[0]]
    with source.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()

    def write(layer: int) -> None:
        prefix = f"model.layers.{layer}."
        told = json.dumps({name.replace(first, prefix): of for name, of in header.items()}).encode()
        told += b" " * (-len(told) % 8)  # tensors begin on eight bytes
        with source.open("rb") as here, (folder / f"copy-{layer}.safetensors").open("wb") as there:
            there.write(len(told).to_bytes(8, "little") + told)
            here.seek(start)
            shutil.copyfileobj(here, there, 1 << 24)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(1, count)))
    for layer in range(1, count):
        for name in names:
            index["weight_map"][name.replace(first, f"model.layers.{layer}.")] = (
                f"copy-{layer}.safetensors"
            )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(
    args: argparse.Namespace,
    sizes: Model,
    folder: Path,
    end: float,
    tell: Callable,
    quality: str = BARRED,
) -> None:
    """Compress the model in `folder` and tell of it. end: time.monotonic() when it must stop."""
    tokens = args.samples * args.tokens
    name = f"{args.model}, {args.layers} layers, {tokens} tokens, 2:4 int4, quality {quality}"
    if quality != BARRED and time.monotonic() > end:
        tell({"row": {"name": name, "seconds": 0.0, "layers": 0, "note": "no time was left"}})
        return
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(3, sizes.vocab, (args.samples, args.tokens), generator=make)
    windows = SimpleNamespace(ids=ids, languages=["random"] * args.samples)
    fields = {"method": "sparsegpt", "nm": "2:4", "bits": 4, "group": GROUP}
    recipe = Recipe(model=str(folder), quality=quality, **fields)
    cuda = args.device == "cuda"
    out, done = folder / quality, []
    begin = time.perf_counter()

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.LayerDone):
            done.append(event.seconds)
            if time.monotonic() > end and len(done) < args.layers:
                raise Enough
        elif isinstance(event, events.Proved):
            print(f"  the replay was proved after {time.perf_counter() - begin:.1f} s", flush=True)

    if cuda:
        torch.cuda.empty_cache()  # what is reserved counts
        torch.cuda.reset_peak_memory_stats()
    with Phases(cuda) as phases, contextlib.suppress(Enough):
        compress(folder / "dense", out, recipe, windows, on_event=on_event, device=args.device)
    seconds = time.perf_counter() - begin
    whole = len(done) == args.layers
    part = "" if whole else f", STOPPED after {len(done)} of {args.layers} layers: no time left"
    row = {
        "name": name + part,
        "quality": quality,
        "seconds": seconds,
        "whole": whole and args.full,
        "layers": len(done),
        "layer_median_seconds": statistics.median(done) if done else None,
    }
    if cuda:  # of torch's allocator; CUDA's own context is some 0.5 GB more
        row["peak_vram"] = torch.cuda.max_memory_reserved()
        row["peak_allocated"] = torch.cuda.max_memory_allocated()
    tell({"row": row})
    for phase, spent in phases.seconds().items():
        tell({"row": {"name": f"of these, quality {quality}: {phase}", "seconds": spent}})
    shutil.rmtree(out, ignore_errors=True)  # it may lie in memory; a run cut short left none


def textbook_layer(args: argparse.Namespace, sizes: Model, end: float, tell: Callable) -> None:
    """The published route for the Linears of one layer: fp32 Hessian, factor and sweep of each.

    Random inputs, no forward passes, so it is less than what that route takes. Matrices that no
    time is left for are named and nothing is extrapolated.
    """
    m, clock = sizes, time.perf_counter
    shapes = {
        "q": (m.hidden, m.hidden), "k": (m.kv, m.hidden), "v": (m.kv, m.hidden),
        "o": (m.hidden, m.hidden), "gate": (m.ff, m.hidden), "up": (m.ff, m.hidden),
        "down": (m.hidden, m.ff),
    }  # fmt: skip
    wait = torch.cuda.synchronize if args.device == "cuda" else (lambda: None)
    spent: dict[str, float] = {}
    with torch.no_grad():
        for name, (rows, cols) in shapes.items():
            if time.monotonic() > end:
                break
            W = torch.randn(rows, cols, dtype=torch.bfloat16, device=args.device)
            x = torch.randn(args.tokens, cols, dtype=torch.bfloat16, device=args.device)
            wait()
            begin = clock()
            H = textbook.Hessian(cols)
            H.H = H.H.to(args.device)
            for _ in range(args.samples):
                H.add(x)
            textbook.sweep(W, H.H, nm=(2, 4), bits=4, group=GROUP, symmetric=True)
            wait()
            spent[name] = clock() - begin
            del W, x, H
    row = {
        "name": "textbook PyTorch, one layer, no forward",
        "seconds": sum(spent.values()),
        "matrices": ", ".join(spent),
    }
    if len(spent) == len(shapes):
        row[f"extrapolated_to_{args.layers}_layers_seconds"] = args.layers * row["seconds"]
    else:
        row["note"] = f"no time was left for {', '.join(n for n in shapes if n not in spent)}"
    tell({"row": row})


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--into", type=Path, required=True, help="JSON lines are added to it")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="of a sample")
    parser.add_argument("--model", default="aya-8b", choices=MODELS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=140, help="seconds for everything together")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the script")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu only tries the script; it needs --quick")
    if min(args.layers, args.samples) < 1 or args.tokens < 2:
        parser.error("at least one layer, one sample and two tokens are needed")
    if args.quick:
        args.layers, args.samples, args.tokens = min(args.layers, 2), 4, 64
    args.full = not args.quick and (args.layers, args.samples, args.tokens) == (32, 128, 2048)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    end = time.monotonic() + args.limit
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU to measure.", file=sys.stderr)
        return 3
    from bench import whole_model

    sizes = QUICK if args.quick else MODELS[args.model]

    def tell(record: dict) -> None:
        with args.into.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        row = record["row"]
        print(f"  {row['name']}: {row['seconds']:.3f} s", flush=True)

    # A tenth of the time is kept for the textbook; quality default gets what a fast run leaves.
    with tempfile.TemporaryDirectory(dir=place(2 * model_bytes(sizes, args.layers))) as folder:
        dense = Path(folder) / "dense"
        dense.mkdir()
        begin = time.perf_counter()
        whole_model.make(dense, sizes, 1)
        repeat_layer(dense, args.layers)
        print(f"  the model was written in {time.perf_counter() - begin:.1f} s", flush=True)
        run(args, sizes, Path(folder), end - 0.1 * args.limit, tell)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        textbook_layer(args, sizes, end - 0.05 * args.limit, tell)
        run(args, sizes, Path(folder), end - 0.05 * args.limit, tell, SECOND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
