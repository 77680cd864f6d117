"""`distaya demo`: the whole way on a bundled model, offline, with only what the wheel carries."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluate import Evaluation, Loaded
    from .progress import Reporter

# What is tried: label, folder name, fields of the recipe.
TRIALS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("50 %", "half", {"sparsity": 0.5}),
    ("2:4 + int4", "2of4-int4", {"nm": "2:4", "bits": 4, "group": 128, "embed_bits": 8}),
)
SPOKEN = ("en", "es", "ja")  # languages a continuation is shown in
_WINDOW = 128  # the bundled texts are short; shorter windows waste less of them
_PROMPT_SHARE = 0.5
_NEW_TOKENS = 24
_SPEED = (64, 16)  # tokens of a prompt, and decoded after it: enough for a table, in a second


@dataclass(frozen=True)
class Trial:
    """One compressed model: where it is and what it cost."""

    label: str
    folder: Path
    seconds: float
    sparsity: float
    nbytes: int  # of the weight files
    packed: bool  # runs on packed weights, not on dense ones


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder to keep the models in; a temporary one without it.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the 50 % model.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older result of ours.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compress the bundled model, measure every language before and after, let it talk."""
    start = time.perf_counter()
    from .output import console, print_json, size
    from .progress import Reporter
    from .report import tell

    folder = Path(tempfile.mkdtemp(prefix="distaya-demo-")) if out is None else out
    trials = TRIALS[:1] if quick else TRIALS
    with ExitStack() as stack:
        assets = stack.enter_context(resources.as_file(resources.files("distaya_ext") / "assets"))
        reporter = stack.enter_context(Reporter(quiet))
        made = [_compress(assets, folder, *trial, reporter, overwrite) for trial in trials]
        found, spoken = _measure(assets, made, reporter)
        pages = _report(assets, made, found, reporter)
        before = sum(f.stat().st_size for f in (assets / "nano-aya").glob("*.safetensors"))
    seconds = time.perf_counter() - start
    if json:
        print_json(_as_dict(made, found, spoken, seconds))
        return
    show = console()
    show.print(comparison(made, found))
    for trial, evaluation in zip(made, found, strict=True):
        show.print(f"{trial.label}: {_worst(evaluation)}", markup=False)
    for lang, prompt, continuations in spoken:
        show.print(f"\n{lang}: {prompt}", markup=False, style="bold")
        for label, text in continuations.items():
            show.print(f"  {label:>10}: {' '.join(text.split())}", markup=False)
    show.print()
    for trial in made:
        show.print(
            f"{trial.label}: {100 * trial.sparsity:.1f} % zeros, weights of {size(before)} now "
            f"{size(trial.nbytes)}{' and run packed' if trial.packed else ', still dense'}, "
            f"compressed in {trial.seconds:.1f} s, written to {trial.folder}",
            markup=False,
        )
    for page in pages:
        tell(show, page)
    show.print(
        f"All figures were measured in this run, {seconds:.0f} s in all.\n{_limits()}", markup=False
    )


def _compress(
    assets: Path,
    folder: Path,
    label: str,
    name: str,
    fields: dict[str, Any],
    reporter: Reporter,
    overwrite: bool,
) -> Trial:
    from ..compress import compress as run
    from ..recipe import Recipe

    texts = assets / "texts" / "calibration"
    spec = {"path": str(texts), "tokens": _all_tokens(assets), "window": _WINDOW}
    model = assets / "nano-aya"
    recipe = Recipe(model=str(model), method="sparsegpt", calibration=spec, **fields)
    reporter.say(f"{label}: sparsegpt on nano-aya")
    report = run(model, folder / name, recipe, on_event=reporter.on_event, overwrite=overwrite)
    packed = recipe.bits is not None
    return Trial(label, folder / name, report.seconds, report.sparsity, report.file_bytes, packed)


def _all_tokens(assets: Path) -> int:
    """As many calibration tokens as every language of the bundled texts can give."""
    from ..checkpoint import open_checkpoint
    from ..texts import read_texts, windows
    from ..tokenizer import load_tokenizer

    checkpoint = open_checkpoint(assets / "nano-aya")
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
    texts = read_texts(assets / "texts" / "calibration")
    return windows(texts, tokenizer, tokens=None, window=_WINDOW).ids.numel()


def _measure(
    assets: Path, made: list[Trial], reporter: Reporter
) -> tuple[list[Evaluation], list[tuple[str, str, dict[str, str]]]]:
    """Evaluations on parallel sentences, and continuations of all models."""
    from ..evaluate import cut_lines, evaluate_loaded, load
    from ..evaluate.continuations import beginnings
    from ..evaluate.run import with_continuations
    from ..texts import read_texts

    texts = read_texts(assets / "texts" / "evaluation", parallel=True)
    dense = load(assets / "nano-aya")
    models = [load(trial.folder) for trial in made]
    samples = cut_lines(texts, dense.tokenizer, longest=dense.model.config.max_position_embeddings)
    found = evaluate_loaded(models, samples, base=dense, on_progress=reporter.on_progress)
    prompts = beginnings(texts, dense, 1, _NEW_TOKENS)
    found = [
        with_continuations(one, model, prompts, base=dense, new_tokens=_NEW_TOKENS)
        for one, model in zip(found, models, strict=True)
    ]
    named = {"before": dense} | {t.label: m for t, m in zip(made, models, strict=True)}
    return found, [_speak(lang, texts[lang][0], named) for lang in SPOKEN if lang in texts]


def _report(
    assets: Path, made: list[Trial], found: list[Evaluation], reporter: Reporter
) -> list[Path]:
    """What was found goes into the folders, with their speed beside the model before; the pages."""
    from ..checkpoint.whole import quiet_transformers
    from ..device import find_device
    from ..measure import model as source
    from ..measure.report import model_json
    from ..report import REPORT, store
    from ..runtime import load

    reporter.say("speed of the models, beside the one before")
    with quiet_transformers():
        models = {trial.label: load(trial.folder) for trial in made}
        dense = models["nano-aya"] = load(assets / "nano-aya")
        most = dense.config.max_position_embeddings // 2
        prompt, new = (min(most, count) for count in _SPEED)
        rows = source.compare(models, source.Setting(prompt, new)).rows
    for trial, evaluation, row in zip(made, found, rows, strict=False):
        told = {**evaluation.to_dict(), "model": trial.label, "base": "nano-aya"}
        pair = source.ModelResult([row, rows[-1]])
        store(trial.folder, "evaluation", {"steps": {"evaluate": told}, "gate": None})
        speed = source.with_ceiling(pair, find_device("cpu"))
        store(trial.folder, "speed", model_json(speed))
    return [trial.folder / REPORT for trial in made]


def _speak(lang: str, sentence: str, models: dict[str, Loaded]) -> tuple[str, str, dict[str, str]]:
    from .generate import go_on

    prompt = sentence[: int(len(sentence) * _PROMPT_SHARE)]
    if " " in prompt:
        prompt = prompt[: prompt.rindex(" ")]
    return (
        lang,
        prompt,
        {k: go_on(m, prompt, max_new_tokens=_NEW_TOKENS) for k, m in models.items()},
    )


def comparison(made: list[Trial], found: list[Evaluation]) -> Table:
    """Languages worst first (by the first model), before and after; English in bold."""
    from rich.table import Table

    from .output import interval, number

    first = found[0]
    table = Table(
        title=f"nano-aya, {first.worst.samples} parallel sentences per language, nats per token",
        title_justify="left",
    )
    table.add_column("lang")
    table.add_column("before", justify="right")
    for trial in made:
        for head in (trial.label, "delta", "95 % CI", "PPL ratio", "top-1"):
            table.add_column(head, justify="right")
    for row in first.languages:
        cells = [row.language, number(row.base_nll)]
        for evaluation in found:
            own = evaluation[row.language]
            cells += [number(own.nll), number(own.dnll, sign=True), interval(own.dnll_interval, 2)]
            cells += [number(own.ppl_ratio, 2), f"{100 * own.agreement:.0f} %"]
        table.add_row(*cells, style="bold" if row.language == "en" else None)
    table.add_section()
    cells = ["all", number(first.base_nll)]
    for evaluation in found:
        delta = evaluation.nll - evaluation.base_nll
        cells += [number(evaluation.nll), number(delta, sign=True), "", "", ""]
    table.add_row(*cells)
    return table


def _worst(evaluation: Evaluation) -> str:
    from .output import verdict

    return verdict(evaluation)


def _limits() -> str:
    from ..evaluate.result import LIMITS

    return (
        "Limits: nano-aya has 8 million parameters and knows nothing; it shows the way, not "
        "what a large model "
        f"loses. 20 sentences per language give wide intervals. {LIMITS}"
    )


def _as_dict(
    made: list[Trial],
    found: list[Evaluation],
    spoken: list[tuple[str, str, dict[str, str]]],
    seconds: float,
) -> dict[str, Any]:
    from ..report import REPORT

    return {
        "trials": [
            {
                "label": trial.label,
                "folder": str(trial.folder),
                "sparsity": trial.sparsity,
                "bytes": trial.nbytes,
                "seconds": round(trial.seconds, 3),
                "report": str(trial.folder / REPORT),
                "evaluation": evaluation.to_dict(),
            }
            for trial, evaluation in zip(made, found, strict=True)
        ],
        "continuations": [
            {"language": lang, "prompt": prompt, "texts": texts} for lang, prompt, texts in spoken
        ],
        "seconds": round(seconds, 3),
        "limits": _limits(),
    }
