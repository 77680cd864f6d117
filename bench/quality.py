"""Quality of every method on a real model: what compression costs, per language, with intervals.

    python bench/quality.py --model MODEL --calibration TRAIN --test TEST [--json OUT] [--readme]
    python bench/quality.py --json OUT --timing 3        # seconds of ours, in turns
    python bench/quality.py --from OUT --picture PNG     # table and pictures, nothing is run

MODEL is a Hugging Face folder, TRAIN and TEST are folders of <lang>.txt (one text a line) or
<lang>.jsonl ("text" in every line); what the package ships is used where they are not given. The
published methods (bench/plain.py) never import the extension; rows of ours run
distaya_ext.compress on the same calibration windows. Nothing is tuned on the test texts.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import harness  # noqa: E402

if __name__ == "__main__":
    harness.passive()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from bench import quality_ours as ours  # noqa: E402
from bench import (  # noqa: E402
    quality_picture,
    quality_report,
    quality_stats,
    quality_store,
    quality_texts,
    quality_timing,
)
from bench.plain import Drawn, Method, drawn, read_folder, textbook_compress  # noqa: E402
from bench.quality_rows import Row, select  # noqa: E402
from bench.quality_score import Base, Scores, score  # noqa: E402

_TEXTS = ("*.txt", "*.jsonl")
_RULER = ("plain.py", "textbook.py", "textbook_masks.py")
_DIGITS = 6  # of what is kept in JSON

_FOLDERS = re.compile(r"(?<![\w.])/(?:[^/\s]+/)+")

Say = Callable[[str], None]


class Run:
    """Model, texts and store of one call; the base is scored when the first row needs it."""

    def __init__(self, args: argparse.Namespace, say: Say):
        from transformers import AutoTokenizer

        if not args.model.is_dir():
            raise SystemExit(f"{args.model} is no folder; the model must be there as a whole")
        self.args, self.say = args, say
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.options = ours.Options(str(args.model), args.group, not args.asymmetric)
        self.store = quality_store.start(args.json, self._settings(), _about(args), args.resume)
        self.codes = {"textbook": quality_texts.fingerprint(ROOT / "bench", _RULER)}
        self._calibration: dict[int, Drawn] = {}
        self._base: Base | None = None

    def _settings(self) -> dict:
        args, mark = self.args, quality_texts.fingerprint
        return {
            "model": args.model.name,
            "model_files": mark(args.model, ["*.safetensors", "config.json"]),
            "calibration": f"{args.calibration.parent.name}/{args.calibration.name}",
            "calibration_files": mark(args.calibration, _TEXTS),
            "test": f"{args.test.parent.name}/{args.test.name}",
            "test_files": mark(args.test, _TEXTS),
            "windows": args.windows,
            "window": args.window,
            "test_windows": args.test_windows,
            "group": args.group,
            "symmetric": not args.asymmetric,
        }

    def calibration(self, seed: int) -> Drawn:
        if seed not in self._calibration:
            texts, a = read_folder(self.args.calibration), self.args
            self._calibration[seed] = drawn(texts, self.tokenizer, a.windows, a.window, seed)
        return self._calibration[seed]

    @property
    def base(self) -> Base:
        if self._base is None:
            args = self.args
            test = quality_texts.test_windows(
                args.test, self.tokenizer, args.window, args.test_windows
            )
            self._base = Base(self.dense(), test)
            each = {lang: float(nll.mean()) for lang, nll in self._base.nll.items()}
            self.store.dense = {
                "nll": sum(each.values()) / len(each),
                "languages": {lang: round(nll, _DIGITS) for lang, nll in each.items()},
            }
            self.say(
                f"{sum(map(len, test.values()))} test windows of {args.window} tokens in "
                f"{len(test)} languages, dense NLL {self.store.dense['nll']:.4f}"
            )
        return self._base

    def dense(self) -> nn.Module:
        """The model anew: rulers change it in place, and none waits in memory for the next."""
        from transformers import AutoModelForCausalLM

        path = self.args.model
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def missing(self, row: Row) -> bool:
        """Whether this build cannot make the row; the store and the reader are told why."""
        why = ours.missing(row) if row.side == "ours" else None
        if why is not None:
            self.tell(row, f"missing: {why}", why)
        return why is not None

    def tell(self, row: Row, line: str, why: str) -> None:
        """Keep why there is no row, without the folders of this machine."""
        self.store.missing[row.key] = _FOLDERS.sub("", why)
        self.store.save()
        self.say(f"{row.key:28} {line}")

    def code(self, row: Row) -> str:
        if row.side not in self.codes:
            self.codes[row.side] = ours.version()
        return self.codes[row.side]

    def row(self, row: Row, seed: int | None) -> bool:
        """Make, judge and keep one row; False when it failed, which is told and kept as missing."""
        windows = self.calibration(self.args.seeds[0] if seed is None else seed)
        self.base  # noqa: B018  (scored before the clock starts)
        try:
            if row.side == "ours":
                made = ours.make(row, windows, self.options, self._budget(row))
            else:
                made = self._ruler(row, windows)
        except ValueError as error:  # our own sentences
            self.tell(row, f"FAILED: {error}", f"failed: {error}")
            return False
        found = score(made.model, self.base)
        self.store.put(_record(row, seed, self.code(row), made, found))
        self.say(
            f"{row.key:28} seed {'any' if seed is None else seed}  delta {found.mean('delta'):+.4f}"
            f"  KL {found.mean('kl'):.4f}  {made.bits:.3f} bits  {made.seconds:.1f} s"
        )
        return True

    def _budget(self, row: Row) -> float | None:
        """Of a search: what the files of the uniform pattern took. ValueError while unknown."""
        if row.kind != "search":
            return None
        uniform = self.store.seeds(f"{row.pattern.name} | ours-plain").values()
        if not uniform:
            raise ValueError(f"run ours-plain at {row.pattern.name} too: it tells the size")
        return max(record["bits"] for record in uniform) + 1e-4  # they are rounded there

    def _ruler(self, row: Row, windows: Drawn) -> ours.Made:
        p, args = row.pattern, self.args
        method = Method(
            row.id, row.kind, sparsity=p.sparsity, nm=p.nm, bits=p.bits, group=args.group,
            symmetric=not args.asymmetric, mlp_only=row.mlp_only,
        )  # fmt: skip
        model = self.dense()
        began = time.perf_counter()
        textbook_compress(model, windows.ids, method)
        seconds = time.perf_counter() - began
        weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        return ours.Made(model, seconds, p.nominal(args.group, not args.asymmetric, zeros))


def _record(row: Row, seed: int | None, code: str, made: ours.Made, found: Scores) -> dict:
    record = {"row": row.key, "seed": seed, "code": code, "seconds": round(made.seconds, 3)}
    record["bits"] = round(made.bits, 4)
    for name in ("nll", "delta", "kl", "agreement"):
        record[name] = round(found.mean(name), _DIGITS)
    record["kl_p99"] = round(found.kl_p99, _DIGITS)
    languages = {lang: asdict(one) for lang, one in found.languages.items()}
    windows = {lang: one.pop("windows") for lang, one in languages.items()}
    record["languages"] = {
        lang: {name: round(value, _DIGITS) for name, value in one.items()}
        for lang, one in languages.items()
    }
    record["windows"] = {lang: [round(x, 5) for x in each] for lang, each in windows.items()}
    return record


def _about(args: argparse.Namespace) -> dict:
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": args.threads,
        "machine": harness.machine(),
    }


def run(args: argparse.Namespace, chosen: list[Row], say: Say) -> tuple[quality_store.Store, bool]:
    """Make every row that the file does not hold yet; False when one failed."""
    here = Run(args, say)
    splits = here.store.settings
    say(f"calibrates on {splits['calibration']}, judged on {splits['test']}")
    fine, able = True, [row for row in chosen if not here.missing(row)]
    for first, seed in enumerate(args.seeds):  # a whole table of one seed before the next seed
        for row in able:
            which = seed if row.seeded else None
            if which is None and first > 0:
                continue
            if here.store.has(row.key, which, here.code(row)):
                say(f"{row.key:28} seed {'any' if which is None else which}  kept")
            else:
                fine &= here.row(row, which)
    if args.timing:
        quality_timing.add(
            here.store, able, here.calibration(args.seeds[0]), here.options, args, say
        )
    return here.store, fine


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    harness.add_sources(parser, "--calibration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration draws")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows in all")
    parser.add_argument("--window", type=int, default=256, help="tokens in a window")
    parser.add_argument("--test-windows", type=int, help="per language (default: all)")
    parser.add_argument("--rows", nargs="+", help="ids of rows, or textbook, or ours")
    parser.add_argument("--patterns", nargs="+", help='names such as "2:4 + int4"')
    parser.add_argument("--group", type=int, default=128, help="inputs per scale, 0 = whole row")
    parser.add_argument("--asymmetric", action="store_true", help="grids with zeros of their own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timing", type=int, help="rounds in which ours take turns")
    parser.add_argument("--json", type=Path, help="where records are kept as they come")
    parser.add_argument("--resume", action="store_true", help="keep the records of --json")
    parser.add_argument("--from", dest="source", type=Path, help="report this JSON, run nothing")
    parser.add_argument("--picture", type=Path, help="PNG to draw (needs matplotlib)")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    parser.add_argument(
        "--split-check", action="store_true", help="fail if test documents are in calibration"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    torch.set_num_threads(args.threads)
    chosen, fine = select(args.rows, args.patterns), True
    if args.picture:
        quality_picture.need()  # before the hours, not after them
    if args.source:
        store = quality_store.read(args.source)
    else:
        common = quality_texts.shared(args.calibration, args.test)
        if common.documents or common.paragraphs or args.split_check:
            print(common, flush=True)
        if common.documents and args.split_check:
            return 1
        store, fine = run(args, chosen, lambda line: print(line, flush=True))
    chosen = quality_stats.rows_in(store)
    found = quality_stats.figures(store, chosen)
    text = quality_report.text(store, chosen, found)
    print(text)
    if args.picture:
        for path in quality_picture.draw(found, args.picture):
            print(f"drew {path.name}")
    if args.readme:
        harness.write_table(ROOT / "README.md", "quality", text)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
