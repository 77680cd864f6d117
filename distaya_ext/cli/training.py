"""What the commands that train share: options, the spec they make, and how they tell of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .languages import parse_quotas
from .progress import Reporter

if TYPE_CHECKING:
    from ..train.publish import Trained
    from ..train.spec import TrainSpec

Out = Annotated[Path, typer.Option(help="Folder to write the result to.", show_default=False)]
Texts = Annotated[
    Path | None,
    typer.Option(
        help="Folder of <lang>.txt, .jsonl or .parquet, or chats: .jsonl lines with messages."
    ),
]
Spec = Annotated[
    Path | None, typer.Option("--spec", help="YAML file of the training; flags beside it win.")
]
Train = Annotated[
    str | None,
    typer.Option(help="lora (default), full (what is dense) or scales (of quantised weights)."),
]
Also = Annotated[
    str | None, typer.Option(help="What learns beside: norms, embeddings, scales; with commas.")
]
Rank = Annotated[int | None, typer.Option(help="Rank of LoRA.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps.")]
LearningRate = Annotated[float | None, typer.Option(help="Highest learning rate.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens per optimiser step.")]
MicroTokens = Annotated[
    int | None, typer.Option(help="Tokens of a step that are in memory at once.")
]
Window = Annotated[int | None, typer.Option(help="Tokens per row.")]
Tokens = Annotated[
    int | None, typer.Option(help="Tokens of text over all languages; all there is without it.")
]
Quota = Annotated[
    list[str] | None,
    typer.Option(help="Tokens of one language, such as en=4096; repeatable."),
]
HeldOut = Annotated[
    float | None, typer.Option(help="Share of each language's rows to choose the best step by.")
]
EvaluateEvery = Annotated[int | None, typer.Option(help="Steps between looks at held-out text.")]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the order of rows and of LoRA.")]
Precision = Annotated[
    str | None, typer.Option(help="auto (bfloat16 where the machine has it), float32, bfloat16.")
]
Checkpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing", help="Less memory, a third more time."),
]
Shard = Annotated[
    str | None,
    typer.Option("--fsdp", help="Under torchrun: full has each rank hold a share of what learns."),
]
PartsOf = Annotated[
    int | None,
    typer.Option("--parts", help="Sums per step: as many give the same bits on fewer ranks."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older result of ours.")]


def build_spec(file: Path | None, texts: Path | None, **flags: Any) -> tuple[TrainSpec, str]:
    """The spec of a file with the flags that were given laid over it, and where the texts are.

    flags are named as the fields of TrainSpec; also may be "norms,embeddings", quota the strings of
    --quota. UsageError for what does not fit, and where neither names texts.
    """
    from ..recipe import read_fields
    from ..train.spec import TrainSpec

    fields = {} if file is None else read_fields(file)
    given = {name: value for name, value in flags.items() if value is not None}
    if isinstance(given.get("also"), str):
        given["also"] = [part.strip() for part in given["also"].split(",") if part.strip()]
    if quotas := given.pop("quota", None):
        given["quotas"] = parse_quotas(quotas)
    if texts is not None:
        given["path"] = str(texts)
    try:
        spec = TrainSpec(**{**fields, **given})
    except UsageError as error:
        raise UsageError(
            f"{file}: {error}" if file is not None and not given else str(error)
        ) from None
    if spec.path is None:
        raise UsageError("say what to train on: --texts FOLDER, or path: in the spec")
    return spec, spec.path


class TrainReporter(Reporter):
    """Progress of a training: steps with their loss, and what held-out text says."""

    def on_event(self, event: Any) -> None:
        """What fit(), finetune() and distill() call."""
        from ..train import events

        match event:
            case events.Started():
                self.say(
                    f"{event.parameters:,} parameters learn in {event.steps} steps of "
                    f"{event.rows} rows ({event.precision}); {event.windows} rows to learn from, "
                    f"{event.held_out} held out"
                )
            case events.Resumed(step, steps):
                self.say(f"going on from the checkpoint of step {step} of {steps}")
            case events.TrainStep(step, steps, terms, _):
                detail = f"loss {terms['loss']:.4f}"
                self._advance("steps", step, steps, detail, always=step == steps)
            case events.Evaluated(step, loss, best):
                mark = ", the best so far" if best and step else ""
                self.say(f"held-out text after step {step}: {loss:.4f} nats per label{mark}")
            case events.Stopped(reason):
                self.say(f"training stopped: {reason}")
            case _:
                super().on_event(event)


def told(reporter: TrainReporter, found: Trained) -> None:
    """The result in two lines."""
    course, merged = found.course, found.merged
    if course.held_out:
        start = course.held_out[0][1]
        reporter.say(
            f"held-out loss {start:.4f} -> {course.best_loss:.4f} nats per label (step "
            f"{course.best_step} of {course.steps})"
        )
    if languages := _by_language(found.record):
        reporter.say(languages)
    reporter.say(
        f"{course.tokens:,} tokens in {course.seconds:.1f} s, "
        f"{course.tokens_per_second:.0f} per second; {len(merged.merged)} matrices merged, "
        f"{len(merged.beside)} with LoRA beside, {merged.checked} compared after writing"
    )
    for notice in merged.notices:
        reporter.say(f"note: {notice}")


def _by_language(record: dict[str, Any]) -> str:
    """Which language gained most and which least on held-out text; "" without any."""
    before, after = record.get("before") or {}, record.get("after") or {}
    gain = {lang: before[lang]["nll"] - each["nll"] for lang, each in after.items()}
    gain.pop("all", None)
    if not gain:
        return ""
    most, least = max(gain, key=gain.__getitem__), min(gain, key=gain.__getitem__)
    return (
        f"nats per label by language: {most} {-gain[most]:+.4f} (gained most), "
        f"{least} {-gain[least]:+.4f} (least)"
    )
