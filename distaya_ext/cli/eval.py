"""`distaya eval`: what each language lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import GateError, UsageError
from ..evaluate.continuations import CONTINUATIONS, NEW_TOKENS
from ..evaluate.gate import GATES, check_possible, parse_gates
from ..ranks import team
from . import options

if TYPE_CHECKING:
    from ..evaluate import Evaluation

_GATES = "; ".join(f"{name}: {gate.what}" for name, gate in GATES.items())


def evaluate(
    model: options.Model,
    texts: Annotated[
        Path | None,
        typer.Option(help="Folder of <lang>.txt, <lang>.jsonl or <lang>.parquet."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The model before compression; compared token by token.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Score this many tokens at most, the same in every language."),
    ] = None,
    lines: Annotated[
        bool,
        typer.Option(
            "--lines", help="Parallel texts: line i is the same sentence in every language."
        ),
    ] = False,
    continuations: Annotated[
        int,
        typer.Option(
            min=0, help="Texts of each language to go on with greedily, for wrong scripts; 0: none."
        ),
    ] = CONTINUATIONS,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each of these continuations.")
    ] = NEW_TOKENS,
    gate: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=LIMIT; exit 6 when it is broken; repeatable. {_GATES}."),
    ] = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="Keep the result in MODEL's folder and its report."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, with commas, instead of texts: "
            "pip install 'distaya-ext[tasks]'."
        ),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="Folder of task YAML files, and of the data they name.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of every task this many questions at most.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; the task's without it.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    exact: options.Exact = False,
    strict: options.StrictKernels = False,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure MODEL per language, worst first; with --against, what compression changed."""
    running = {"dtype": dtype, "device": device, "offline": offline, "exact": exact}
    if tasks is not None:
        if texts is not None or gate or report:
            raise UsageError("--tasks has questions of its own: no --texts, --gate or --report")
        from .output import kernels_told
        from .tasks import answer

        with kernels_told(strict):
            answer(model, tasks, against, task_path, limit, num_fewshot, running, json, quiet)
        return
    if task_path is not None or limit is not None or num_fewshot is not None:
        raise UsageError("--task-path, --limit and --num-fewshot are about --tasks")
    if texts is None:
        raise UsageError("say what to measure on: --texts FOLDER, or --tasks NAMES")
    limits = parse_gates(gate or [])
    check_possible(limits, base=against is not None, continuations=continuations > 0)
    if lines and tokens is not None:
        raise UsageError("--tokens cuts windows and has no meaning with --lines")

    if report:
        from ..report import check_stores

        check_stores(model)
    from ..evaluate import evaluate as compare
    from .output import kernels_told, print_json
    from .progress import Reporter
    from .remember import evaluated

    first = team().first
    with Reporter(quiet or not first) as reporter, kernels_told(strict):
        found = compare(
            model,
            texts,
            against=against,
            window=window,
            tokens=tokens,
            per_line=lines,
            continuations=continuations,
            new_tokens=new_tokens,
            on_progress=reporter.on_progress,
            **running,
        )
    broken = _broken(found, limits)
    if first:  # all ranks have found the same
        cut = "lines" if lines else f"windows of {window}, {tokens or 'all'} tokens"
        how = f"{cut}, {dtype} on {device}{', exact' if exact else ''}"
        evaluated(found, model, against, texts, how)
        if json:
            print_json(found.to_dict())
        else:
            show(found)
        if report:
            _store(model, found, broken, limits)
    team().wait()  # an error of one rank ends all, and rank 0 still writes
    if broken is not None:
        raise broken


def show(found: Evaluation) -> None:
    """The table, the verdict, what it does not say."""
    from .output import console, evaluation_table, verdict

    out = console()
    out.print(evaluation_table(found))
    out.print(verdict(found), markup=False)
    for note in found.to_dict()["notes"]:
        out.print(note, markup=False, style="dim")


def _broken(found: Evaluation, limits: dict[str, float]) -> GateError | None:
    try:
        found.gate(**limits)
    except GateError as error:
        return error
    return None


def _store(
    model: str, found: Evaluation, broken: GateError | None, limits: dict[str, float]
) -> None:
    from ..report import REPORT, store
    from .output import console
    from .report import run_before, tell

    value: dict[str, Any] = {"steps": {"evaluate": found.to_dict()}, "asked": limits}
    value |= {"gate": None if broken is None else str(broken), "before": run_before("eval")}
    path = store(Path(model).expanduser(), "evaluation", value)
    tell(console(err=True), path.with_name(REPORT))
