"""One host's two cores as two ranks of one compression, beside one process on one core.

    python bench/scaling.py [--readme] [--docs] [--out FILE]     # twenty minutes, two quiet cores
    python bench/scaling.py --arithmetic [--docs]                # 8 GPUs, computed: seconds

A random model with layers of Aya-8B's shape is compressed by one process with one thread and by
`torchrun --nproc-per-node 2` with one thread each, in turns; medians of --repeats. Beside them: the
same work twice at the same time in two processes that know nothing of each other, which is what
this machine can give two of them at best, and one process that sums in two parts, whose weights
must be those of the two ranks, bit for bit. `distaya plan --ranks` is asked what it expects.
--layers, --model, --tokens, --quality: smaller, or more. --arithmetic: see bench/arithmetic.py.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

from distaya_ext.measure.shapes import MODELS, Model  # noqa: E402

TEXTS = ROOT / "distaya_ext" / "assets" / "texts" / "calibration"
SPACED = ("de", "en", "es", "fr", "it", "pl", "pt", "tr")  # languages whose words are shuffled
RESULTS = ROOT / "bench" / "results" / "scaling.json"
VOCABULARY = 8192  # that of the bundled tokenizer; the embedding is not what is measured
SMALL = {"small": Model(1024, 3584, 16, 4, VOCABULARY), "tiny": Model(256, 512, 8, 2, VOCABULARY)}
RANKS = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_ONE, _TWO, _BOTH = "one process", "two ranks", "two runs at once that share nothing"


def sizes_of(name: str) -> Model:
    """A layer of that model's shape and a vocabulary of the bundled tokenizer's size."""
    found = SMALL.get(name) or MODELS[name]
    return Model(found.hidden, found.ff, found.heads, found.kv_heads, VOCABULARY)


def texts(folder: Path, tokens: int) -> Path:
    """More text than is bundled: its words, shuffled. The weights are random, too."""
    every = [word for name in SPACED for word in (TEXTS / f"{name}.txt").read_text().split()]
    rng, lines, length = random.Random(0), [], 0
    while length < 8 * tokens:  # characters
        lines.append(" ".join(rng.choices(every, k=400)))
        length += len(lines[-1])
    folder.mkdir()
    (folder / "en.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def recipe(args: argparse.Namespace, folder: Path, parts: int | None = None) -> dict[str, Any]:
    """As a YAML file holds it; JSON is YAML."""
    calibration = {"path": str(folder), "tokens": args.tokens, "window": args.window}
    if parts is not None:
        calibration["parts"] = parts
    fields = {"method": "sparsegpt", "nm": "2:4", "bits": 4, "quality": args.quality}
    return {**fields, "calibration": calibration}


def started(words: list[str], ranks: int) -> subprocess.Popen:
    """`distaya compress` with one thread for each process."""
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", str(port)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {**ONE_THREAD, "DISTAYA_HISTORY": "off"}
    return subprocess.Popen(
        [*command, "-m", "distaya_ext", "compress", *words, "--quiet"],
        env={**os.environ, **quiet, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(child: subprocess.Popen, what: str) -> tuple[float, int]:
    """Seconds of processor time it took, those it started included; bytes that the largest of them
    had in memory at most.
    """
    told = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{what} ended with code {child.returncode}: {told.strip()[-800:]}")
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def run(model: Path, file: Path, out: Path, name: str, ranks: int = 1, times: int = 1) -> dict:
    """One measurement: `times` runs of `ranks` processes each, all at once. wall: of the command;
    run: what results.json says, the mean of them; cpu: of all processes; peak: of the largest one.
    """
    outs = [out.with_name(f"{out.name}-{i}") for i in range(times)]
    for each in outs:
        shutil.rmtree(each, ignore_errors=True)
    start = time.perf_counter()
    at_work = [started([str(model), "--recipe", str(file), "--out", str(o)], ranks) for o in outs]
    spent = [finished(child, name) for child in at_work]
    cpu, peak = sum(each for each, _ in spent), max(most for _, most in spent)
    wall = time.perf_counter() - start
    told = [json.loads((each / "results.json").read_text(encoding="utf-8")) for each in outs]
    seconds = sum(each["totals"]["seconds"] for each in told) / times
    found = {"name": name, "wall": wall, "run": seconds, "cpu": cpu, "peak": peak}
    found["weights"] = weights(outs[0])
    print(f"{name:42} {wall:7.1f} s, run {seconds:7.1f} s, processor {cpu:7.1f} s", flush=True)
    return {**found, "tokens": told[0]["calibration"]["tokens"], "ranks": told[0]["ranks"]}


def weights(folder: Path) -> str:
    """A hash of the weight files."""
    made = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        made.update(path.read_bytes())
    return made.hexdigest()


def measure(args: argparse.Namespace, work: Path) -> dict:
    """Everything as JSON; says what it does."""
    from bench.whole_model import make

    model, out, files = work / "model", work / "out", {}
    calib = texts(work / "texts", args.tokens)
    print("writing the model", flush=True)
    make(model, sizes_of(args.model), args.layers)
    for parts in (None, RANKS):
        files[parts] = work / f"recipe-{parts}.yaml"
        files[parts].write_text(json.dumps({"model": str(model), **recipe(args, calib, parts)}))
    rows = []
    both = []
    for turn in range(max(args.repeats, args.pairs)):
        if turn < args.repeats:
            rows.append(run(model, files[None], out, _ONE))
            rows.append(run(model, files[None], out, _TWO, ranks=RANKS))
        if turn < args.pairs:
            both.append(run(model, files[None], out, _BOTH, times=RANKS))
    alike = run(model, files[RANKS], out, "one process, two parts")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": harness.machine(),
        "model": {"name": args.model, "layers": args.layers, **vars(sizes_of(args.model))},
        "recipe": {k: v for k, v in recipe(args, calib).items() if k != "calibration"},
        "tokens": rows[0]["tokens"],
        "window": args.window,
        "rows": rows,
        "parts": alike,
        "both": both,
        "plan": planned(args, model, calib),
    }


def planned(args: argparse.Namespace, model: Path, calib: Path) -> dict:
    """What `distaya plan --ranks` says of the same runs; its rehearsal has one thread, too."""
    from distaya_ext import Recipe, plan

    os.environ.update(ONE_THREAD)  # of the process that rehearses

    asked = Recipe(model=str(model), **recipe(args, calib))
    print("asking the cost model", flush=True)
    return plan(model, asked, ranks=[1, RANKS]).scaling.to_dict()


def main(words: list[str] | None = None) -> None:
    from bench import arithmetic, scaling_report

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="aya-8b", choices=[*MODELS, *SMALL])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=81920)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--quality", default="plain", choices=["plain", "default", "high"])
    parser.add_argument("--repeats", type=int, default=3, help="of one process and of two ranks")
    parser.add_argument("--pairs", type=int, default=1, help="of two runs at once")
    parser.add_argument("--folder", type=Path, help="where model and output are for a while")
    parser.add_argument("--out", type=Path, help="where the figures go; --readme: the usual place")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    parser.add_argument("--docs", action="store_true", help="rewrite those of docs/scaling.md")
    parser.add_argument("--from", type=Path, dest="kept", help="take the figures of this file")
    parser.add_argument("--arithmetic", action="store_true", help="compute 8 GPUs, measure nothing")
    args = parser.parse_args(words)
    if args.arithmetic:
        text = arithmetic.text(arithmetic.rows())
        print(text)
        if args.docs:
            harness.write_table(ROOT / "docs" / "scaling.md", "scaling-arithmetic", text)
        return
    if args.kept is not None:
        found = json.loads(args.kept.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="distaya-") as folder:
            found = scaling_report.judged(measure(args, Path(folder)))
        out = args.out or (RESULTS if args.readme or args.docs else None)
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = scaling_report.text(found)
    print(text)
    if args.readme:
        harness.write_table(ROOT / "README.md", "scaling", text)
    if args.docs:
        more = f"{text}\n\n{scaling_report.parts(found)}"
        harness.write_table(ROOT / "docs" / "scaling.md", "scaling", more)
    if not found["same_bits"]:
        raise SystemExit("two ranks gave other weights than one process with two parts")


if __name__ == "__main__":
    main()
