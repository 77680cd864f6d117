"""Coverage-guided fuzzing of what reads other people's files, with atheris.

    python tools/fuzz.py --target recipe --seconds 300
    python tools/fuzz.py --list

Runs the targets of tests/fuzz_readers.py and tests/fuzz_packed.py, the same that pytest replays.
Inputs that reach new code are kept beside tests/corpus/TARGET in --work and minimised into the
corpus with --keep. An input that breaks the contract ends the run with its traceback, exit code 1,
and the file that holds it; put that file into the corpus once the defect is mended.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "corpus"
MOST_KEPT = 24_000  # bytes of a target's corpus
LONGEST = 256  # bytes of an input: each is a decision or a piece of a file


def targets() -> dict:
    """Every target by name. Importing them imports what they test."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import fuzz_packed
    import fuzz_readers

    return {target.name: target for target in fuzz_readers.TARGETS + fuzz_packed.TARGETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="one of --list")
    parser.add_argument("--seconds", type=int, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's choices")
    parser.add_argument("--work", type=Path, help="folder of inputs that reached new code")
    parser.add_argument("--keep", action="store_true", help="add the smallest set to the corpus")
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
    if args.keep:
        keep(args.target, work)
    else:
        fuzz(atheris, args.target, work, args.seconds, args.seed)


def fuzz(atheris, name: str, work: Path, seconds: int, seed: int) -> None:
    """Never returns: libFuzzer ends the process."""
    logging.disable(logging.CRITICAL)  # what transformers thinks of broken configs
    with atheris.instrument_imports(include=["distaya_ext", "fuzz_readers", "fuzz_packed"]):
        known = targets()
    if name not in known:
        sys.exit(f"{name} is no target; one of {', '.join(known)} is needed")
    target = known[name].prepare(Path(tempfile.mkdtemp(prefix="fuzz-place-")))
    kept = CORPUS / name
    folders = [str(work)] + ([str(kept)] if kept.is_dir() else [])
    options = [
        f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-seed={seed}", "-timeout=60",
        "-rss_limit_mb=4096", f"-artifact_prefix={work}/broken-", "-print_final_stats=1",
        "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, *folders], target.run)
    atheris.Fuzz()


def keep(name: str, work: Path) -> None:
    """Minimise work and the corpus together into the corpus, smallest inputs first."""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as merged:
        code = (
            "import sys, atheris, logging, tempfile; from pathlib import Path\n"
            f"sys.path[:0] = [{str(ROOT)!r}]\n"
            "logging.disable(logging.CRITICAL)\n"
            "with atheris.instrument_imports(include=['distaya_ext']):\n"
            "    from tools.fuzz import targets; known = targets()\n"
            f"target = known[{name!r}].prepare(Path(tempfile.mkdtemp(prefix='fuzz-place-')))\n"
            "atheris.Setup(sys.argv, target.run); atheris.Fuzz()\n"
        )
        script = Path(merged, "merge.py")
        script.write_text(code, encoding="utf-8")
        inputs = [str(folder) for folder in (work, CORPUS / name) if folder.is_dir()]
        out = Path(merged, "out")
        out.mkdir()
        subprocess.run([sys.executable, script, "-merge=1", out, *inputs], check=True)
        found = sorted(out.iterdir(), key=lambda path: (path.stat().st_size, path.name))
        place, size = CORPUS / name, 0
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            if not old.name.startswith("defect-"):
                old.unlink()
        for path in found:
            data = path.read_bytes()
            if size + len(data) <= MOST_KEPT and not os.path.basename(path).startswith("broken-"):
                size += len(data)
                (place / hashlib.blake2b(data, digest_size=6).hexdigest()).write_bytes(data)
        print(f"{name}: {len(list(place.iterdir()))} inputs, {size} bytes")


if __name__ == "__main__":
    main()
