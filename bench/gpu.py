"""Everything there is to measure on an NVIDIA GPU, in one command and within nine minutes.

    python bench/gpu.py [--build] [--readme] [--only SECTIONS] [--skip SECTIONS] [--minutes 9]
    python bench/gpu.py --from bench/results/FILE.json [--readme]

Runs `pytest -m cuda` and, beside it, compute-sanitizer's four tools over bench/gpu_sanitize.py;
measures the device's ceilings; times every op of the rooms at Aya-8B's shapes beside torch (CUDA
events, or CUDA graphs where calls are short; medians; inputs rotated through more than the L2);
compresses a whole model of that shape (bench/gpu_whole.py). Then it prints the table, holds the
figures against the bars (bench/gpu_bars.py) and writes bench/results/<device>-<date>.json; with
--readme also the tables of README.md. --from does the last part again from such a file.

Every section has a process and a time budget of its own: one that fails, crashes or hangs is
recorded with its sentence, and the others still run. A section that nears its budget makes fewer
repeats and says so.

--build first runs pip install for the present device alone (needs nvcc); when that fails nothing
else runs, because the figures would be those of an older build. `--device cpu --quick` tries the
logic on tiny shapes where there is no GPU. Exit code 0: all well; 1: a section failed;
2: wrong arguments; 3: there is no GPU to measure, or a package that this needs is not installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from bench import gpu_bars, gpu_checks, gpu_sections  # noqa: E402
from bench.gpu_report import (  # noqa: E402
    Report,
    Section,
    circumstances,
    closing,
    results_file,
    table,
)

# Seconds of each section in a run of nine minutes, in order; 20 more are for what lies between.
BUDGETS = {
    "build": 100,
    "tests": 80,
    "sanitize": 80,
    "ceilings": 10,
    "hessian": 15,
    "cholesky": 30,
    "obs": 30,
    "mask": 10,
    "refit": 15,
    "dass": 10,
    "influence": 10,
    "pack": 5,
    "sqgemm": 60,
    "whole": 145,
}
MINUTES = 9
ROOMS = ("hessian", "cholesky", "obs", "mask", "refit", "dass", "influence", "pack", "sqgemm")
TOGETHER = ("tests", "sanitize")  # they time nothing, so they run beside each other
ON_GPU = {"build", *TOGETHER}  # what --device cpu leaves out


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed arguments; `sections` are the names to run, in order. Exits with 2 if wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ", ".join(BUDGETS)
    parser.add_argument("--build", action="store_true", help="pip install for this device first")
    parser.add_argument("--readme", action="store_true", help="write the tables of README.md")
    parser.add_argument("--from", dest="file", type=Path, help="measure nothing, read this file")
    parser.add_argument("--only", default="", help=f"sections, comma-separated: {names}")
    parser.add_argument("--skip", default="", help="sections to leave out, comma-separated")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together")
    parser.add_argument("--out", type=Path, help="JSON file instead of bench/results/...")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test, not kept")
    parser.add_argument("--dry-run", action="store_true", help="print the sections and stop")
    args = parser.parse_args(argv)
    only, skip = (set(filter(None, text.split(","))) for text in (args.only, args.skip))
    if unknown := sorted((only | skip) - set(BUDGETS)):
        parser.error(f"no section named {', '.join(unknown)}; there are {names}")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu is only a smoke test; it needs --quick")
    if args.device == "cpu" and (args.build or only & ON_GPU):
        parser.error(f"the sections {', '.join(n for n in BUDGETS if n in ON_GPU)} need a GPU")
    if args.readme and (args.quick or args.device == "cpu"):
        parser.error("a smoke test has no figures for --readme")
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0 but is {args.minutes:g}")
    wanted = only or set(BUDGETS) - {"build"}
    if wanted & set(ROOMS):
        wanted = wanted | {"ceilings"}  # no figure without what it is measured against
    if args.build:
        wanted = wanted | {"build"}
    if args.device == "cpu":
        wanted = wanted - ON_GPU
    args.sections = [name for name in BUDGETS if name in wanted - skip]
    if not args.sections:
        parser.error("nothing is left to run")
    args.build = "build" in args.sections
    return args


def budgets(minutes: float) -> dict[str, float]:
    """Seconds of each section in a run of so many minutes."""
    return {name: seconds * minutes / MINUTES for name, seconds in BUDGETS.items()}


def no_gpu() -> str:
    """Why torch has no GPU to offer, as a sentence; empty when it has one."""
    try:
        import torch
    except ImportError:
        return "torch is not installed; install a CUDA build of it first"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU and driver on this machine"
    return ""


def groups(names: Sequence[str]) -> list[list[str]]:
    """The sections in order, those that run beside each other in one list."""
    together = [name for name in names if name in TOGETHER]
    rest = [[name] for name in names if name not in TOGETHER]
    return [together, *rest] if together else rest


def run(
    args: argparse.Namespace,
    report: Report,
    end: float,
    save: Callable[[], None] = lambda: None,
    command: Callable[..., Sequence[str]] = gpu_sections.measuring,
) -> None:
    """Run the sections after build. Each may take what the later ones' budgets leave until `end`.

    end: time.monotonic() when everything must be over. save() is called after every group.
    """
    share = budgets(args.minutes)
    parts = groups([name for name in args.sections if name != "build"])
    cost = [max(share[name] for name in group) for group in parts]
    for index, group in enumerate(parts):
        begin = time.monotonic()
        limit = min(max(end - begin - sum(cost[index + 1 :]), cost[index] / 2), end - begin - 1)
        sections = [Section(name, budget=share[name]) for name in group]
        report.sections += sections
        print(f"{' and '.join(group)} ...", flush=True)

        def each(section: Section, limit: float = limit, begin: float = begin) -> None:
            run_section(section, limit, args, report, command)
            section.seconds = time.monotonic() - begin

        with ThreadPoolExecutor(len(sections)) as pool:
            list(pool.map(each, sections))
        save()


def run_section(
    section: Section,
    limit: float,
    args: argparse.Namespace,
    report: Report,
    command: Callable[..., Sequence[str]],
) -> None:
    env = gpu_sections.environment(args.build)
    if limit <= 0:
        section.status, section.said = "failed", f"no time was left of {args.minutes:g} minutes"
    elif section.name == "tests":
        gpu_checks.tests(section, limit, env)
    elif section.name == "sanitize":
        gpu_checks.sanitize(section, limit, env)
    elif section.name == "whole":
        told = gpu_sections.whole(args.device, args.quick)
        gpu_sections.measured(section, limit, env, told, report, all_of_it=True)
    else:
        told = command(section.name, args.device, args.quick)
        gpu_sections.measured(section, limit, env, told, report)


def prepare(args: argparse.Namespace, report: Report) -> str:
    """Build if asked, then ask the package for its facts. Returns why nothing can be measured."""
    if absent := gpu_sections.lacking(args.build):
        return f"{' and '.join(absent)} must be installed first"
    share = budgets(args.minutes)
    arch = gpu_sections.device_arch() if args.build else ""
    if args.build:
        section = Section("build", budget=share["build"])
        report.sections.append(section)
        print("build ...", flush=True)
        begin = time.monotonic()
        gpu_sections.build(section, share["build"] + 60 * args.minutes / MINUTES, arch)
        section.seconds = time.monotonic() - begin
        if section.status == "failed":
            return "the build failed, and an older one is not worth measuring"
    facts = Section("facts", budget=share["ceilings"])
    told = gpu_sections.measuring("facts", args.device, args.quick)
    gpu_sections.measured(facts, 60, gpu_sections.environment(args.build), told, report)
    if facts.failures:
        return f"distaya_ext cannot be used ({facts.said}); CONTRIBUTING.md says how to build it"
    carried = report.facts["archs"]
    if arch and arch not in carried:
        section.status = "failed"
        section.said = f"made kernels for {' '.join(carried) or 'the CPU alone'}, asked was {arch}"
        return "the build did not do as asked; remove the folder build and try again"
    return report.facts.get("refusal", "")


def dry_run(args: argparse.Namespace) -> None:
    """The sections with their budgets, and every case by name."""
    from bench import gpu_case, gpu_cases

    share = budgets(args.minutes)
    for name in args.sections:
        print(f"{name}: {share[name]:.0f} s")
        if name in ROOMS:
            size = gpu_case.size(args.quick, args.device)
            print("\n".join(f"  {case}" for case in gpu_cases.cases(name, size)))


def tell(args: argparse.Namespace, report: Report, path: Path | None) -> int:
    """The tables, on the screen and in README.md. Returns the exit code."""
    print(f"\n{table(report)}\n\n{closing(report)}\n\n{gpu_bars.table(report)}")
    if path and path.exists():
        print(f"Written: {path}")
    if args.readme:
        gpu_bars.write_readme(report, ROOT / "README.md")
    return 1 if report.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.dry_run:
        dry_run(args)
        return 0
    if args.file:
        return tell(args, Report.load(args.file), None)
    end = time.monotonic() + args.minutes * 60
    refusal = no_gpu() if args.device == "cuda" else ""
    if refusal:
        print(f"There is no GPU to measure: {refusal}.", file=sys.stderr)
        return 3
    report = Report(facts=circumstances())
    if refusal := prepare(args, report):
        lines = [*report.failures, f"Nothing was measured: {refusal}."]
        print("\n".join(lines), file=sys.stderr)
        return 1 if report.failures else 3
    path = args.out
    if path is None and not report.facts["smoke"]:
        path = results_file(report.facts)
    run(args, report, end, lambda: report.save(path) if path else None)
    return tell(args, report, path)


if __name__ == "__main__":
    sys.exit(main())
