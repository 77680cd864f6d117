"""Coverage-guided fuzzing of what reads other people's files, with atheris.

    python tools/fuzz.py --list
    python tools/fuzz.py --target recipe --seconds 300 --work found/recipe
    python tools/fuzz.py --target recipe --work found/recipe --keep

Runs the targets of tests/fuzz_*.py, the same that pytest runs.
Inputs that reach new code are written to --work; --keep minimises them together with the corpus
into tests/corpus/TARGET.txt. An input that breaks the contract ends the run with its traceback
and exit code 77, and lies in --work as broken-*: mend the defect, and --defect that file into the
corpus.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
MOST_KEPT = 120  # inputs of a target that pytest replays
LONGEST = 256  # bytes of an input: each is a decision or a piece of a file
_INNER = "DISTAYA_FUZZ_TARGET"  # set where libFuzzer starts this file itself, with its own flags
_AGAIN = "DISTAYA_FUZZ_AGAIN"  # and the program by which it does
_TARGETS = ("fuzz_readers", "fuzz_folders", "fuzz_packed")


def targets() -> dict:
    """Every target by name. Importing them imports what they test."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import fuzz_folders
    import fuzz_packed

    return {target.name: target for target in fuzz_folders.TARGETS + fuzz_packed.TARGETS}


def main() -> None:
    if name := os.environ.get(_INNER):
        import atheris

        start(atheris, name, [os.environ[_AGAIN], *sys.argv[1:]])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="one of --list")
    parser.add_argument("--seconds", type=int, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's choices")
    parser.add_argument("--work", type=Path, help="folder of inputs that reached new code")
    parser.add_argument("--keep", action="store_true", help="minimise --work into the corpus")
    parser.add_argument("--defect", type=Path, help="add this input to the corpus, for good")
    parser.add_argument("--list", action="store_true", help="print the targets")
    args = parser.parse_args()
    if args.list:
        print("\n".join(targets()))
        return
    try:
        import atheris
    except ImportError:
        sys.exit("coverage-guided fuzzing needs atheris, which is not here: pip install atheris")
    work = args.work or Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    work.mkdir(parents=True, exist_ok=True)
    if args.defect:
        append(args.target, args.defect.read_bytes())
    elif args.keep:
        keep(args.target, work)
    else:
        corpus = expanded(args.target, Path(tempfile.mkdtemp(prefix="fuzz-corpus-")))
        options = [f"-max_total_time={args.seconds}", f"-seed={args.seed}", "-print_final_stats=1"]
        options += [f"-artifact_prefix={work}/broken-", str(work), str(corpus)]
        start(atheris, args.target, [sys.argv[0], *options])


def start(atheris: ModuleType, name: str, argv: list[str]) -> NoReturn:
    """Hand the process over to libFuzzer, which ends it."""
    logging.disable(logging.CRITICAL)  # what transformers thinks of broken configs
    with atheris.instrument_imports(include=["distaya_ext", *_TARGETS]):
        known = targets()
    if name not in known:
        sys.exit(f"{name} is no target; one of {', '.join(known)} is needed")
    target = known[name].prepare(Path(tempfile.mkdtemp(prefix="fuzz-place-")))
    limits = [f"-max_len={LONGEST}", "-len_control=0", "-timeout=60", "-rss_limit_mb=4096"]
    atheris.Setup([argv[0], *limits, *argv[1:]], target.run)
    atheris.Fuzz()
    sys.exit(0)


def expanded(name: str, folder: Path) -> Path:
    """The corpus of a target as the folder of files that libFuzzer reads."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from fuzzing import kept

    for i, data in enumerate(kept(name)):
        (folder / str(i)).write_bytes(data)
    return folder


def keep(name: str, work: Path) -> None:
    """Minimise work and the corpus into the corpus: the smallest inputs that reach all there is."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from fuzzing import CORPUS

    with tempfile.TemporaryDirectory() as room:
        out, old = Path(room, "out"), Path(room, "old")
        out.mkdir()
        old.mkdir()
        again = Path(room, "again")  # libFuzzer starts its own first argument once more
        again.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
        again.chmod(0o755)
        command = [again, "-merge=1", out, work, expanded(name, old)]
        subprocess.run(command, check=True, env={**os.environ, _INNER: name, _AGAIN: str(again)})
        found = sorted((path.read_bytes() for path in out.iterdir()), key=lambda d: (len(d), d))
    path = CORPUS / f"{name}.txt"
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    marks = [i + 1 for i, line in enumerate(lines) if line.startswith("# defect")]
    defects = [line for i in marks for line in lines[i - 1 : i + 1]]
    chosen = [data.hex() for data in found[:MOST_KEPT] if data and data.hex() not in defects]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([*defects, *chosen]) + "\n", encoding="ascii")
    print(f"{name}: {len(chosen)} inputs and {len(marks)} defects, {path.stat().st_size} bytes")


def append(name: str, data: bytes) -> None:
    """Put an input that found a defect in front of the corpus, where --keep leaves it."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from fuzzing import CORPUS

    path = CORPUS / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    held = path.read_text(encoding="ascii") if path.is_file() else ""
    path.write_text(f"# defect\n{data.hex()}\n{held}", encoding="ascii")


if __name__ == "__main__":
    main()
