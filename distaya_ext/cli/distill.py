"""`distaya distill` and `distaya heal`: a student learns from its teacher."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ..errors import UsageError
from . import options, training

Teacher = Annotated[
    str, typer.Argument(help="The model that teaches: local folder or hub id.", show_default=False)
]
Student = Annotated[
    str, typer.Option(help="The model that learns: local folder or hub id.", show_default=False)
]
Compressed = Annotated[
    str, typer.Argument(help="The compressed model, a local folder.", show_default=False)
]
Against = Annotated[
    str, typer.Option(help="The model before compression: folder or hub id.", show_default=False)
]
Ce = Annotated[float | None, typer.Option(help="Weight of cross entropy with the text.")]
Kl = Annotated[float | None, typer.Option(help="Weight of T^2 KL(teacher || student).")]
Temperature = Annotated[float | None, typer.Option(help="T of the KL.")]
Cosine = Annotated[float | None, typer.Option(help="Weight of 1 - cos of hidden states.")]
Mse = Annotated[float | None, typer.Option(help="Weight of hidden states' squared difference.")]
Spans = Annotated[
    float | None, typer.Option(help="Weight of byte-aligned spans, where tokenizers differ.")
]
Layers = Annotated[
    str | None,
    typer.Option(help="Hidden states to compare: last, all, or student:teacher as in 1:3,2:6."),
]
CacheTokens = Annotated[
    int | None,
    typer.Option("--cache", help="Write the teacher's so many most probable tokens once."),
]
CacheSize = Annotated[str | None, typer.Option(help="Disk the cache may take, such as 2GiB.")]

_LOSS = ("ce", "kl", "temperature", "cosine", "mse", "spans", "layers", "cache", "cache_size")


def distill(
    teacher: Teacher,
    student: Student,
    out: training.Out,
    texts: training.Texts = None,
    spec: training.Spec = None,
    ce: Ce = None,
    kl: Kl = None,
    temperature: Temperature = None,
    cosine: Cosine = None,
    mse: Mse = None,
    spans: Spans = None,
    layers: Layers = None,
    cache: CacheTokens = None,
    cache_size: CacheSize = None,
    train: training.Train = None,
    also: training.Also = None,
    rank: training.Rank = None,
    steps: training.Steps = None,
    learning_rate: training.LearningRate = None,
    batch_tokens: training.BatchTokens = None,
    micro_tokens: training.MicroTokens = None,
    window: training.Window = None,
    tokens: training.Tokens = None,
    quota: training.Quota = None,
    held_out: training.HeldOut = None,
    evaluate_every: training.EvaluateEvery = None,
    save_every: training.SaveEvery = None,
    seed: training.Seed = None,
    precision: training.Precision = None,
    gradient_checkpointing: training.Checkpointing = None,
    shard: training.Shard = None,
    parts: training.PartsOf = None,
    overwrite: training.Overwrite = False,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train STUDENT on what TEACHER predicts and write it to OUT in its own format.

    Without weights of a loss it is KL alone; where the tokenizers differ, the losses that are
    defined are chosen and said aloud. A run that was stopped goes on when the same command is given
    again.
    """
    _run("distill", teacher, student, {}, dict(locals()))


def heal(
    compressed: Compressed,
    against: Against,
    out: training.Out,
    texts: training.Texts = None,
    spec: training.Spec = None,
    ce: Ce = None,
    kl: Kl = None,
    temperature: Temperature = None,
    cosine: Cosine = None,
    mse: Mse = None,
    layers: Layers = None,
    cache: CacheTokens = None,
    cache_size: CacheSize = None,
    train: training.Train = None,
    also: training.Also = None,
    rank: training.Rank = None,
    steps: training.Steps = None,
    learning_rate: training.LearningRate = None,
    batch_tokens: training.BatchTokens = None,
    micro_tokens: training.MicroTokens = None,
    window: training.Window = None,
    tokens: training.Tokens = None,
    quota: training.Quota = None,
    held_out: training.HeldOut = None,
    evaluate_every: training.EvaluateEvery = None,
    save_every: training.SaveEvery = None,
    seed: training.Seed = None,
    precision: training.Precision = None,
    gradient_checkpointing: training.Checkpointing = None,
    shard: training.Shard = None,
    parts: training.PartsOf = None,
    overwrite: training.Overwrite = False,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Win back what COMPRESSED lost: distill with the model before it as the teacher.

    LoRA, KL and the cosine of hidden states, with settings that suit healing. Pruned weights stay
    0, quantised ones keep their codes (LoRA stays beside them).
    """
    from ..train.healing import HEALING

    _run("heal", against, compressed, HEALING, dict(locals()))


def _run(
    command: str,
    teacher: str,
    student: str,
    defaults: Mapping[str, Any],
    flags: dict[str, Any],
) -> None:
    """Distil as the flags of the command say, over the spec's file, over the defaults."""
    asked, where = _asked(defaults, flags)
    from ..ranks import team
    from ..train.distill import distill as run
    from .output import print_json
    from .remember import trained

    out = flags["out"]
    with training.TrainReporter(flags["quiet"]) as reporter:
        found = run(
            teacher,
            student,
            out,
            where,
            asked,
            device=flags["device"],
            offline=flags["offline"],
            overwrite=flags["overwrite"],
            on_event=reporter.on_event,
        )
        if not team().first:
            return
        training.told(reporter, found)
        for line in _gained(found.record):
            reporter.say(line)
    trained(found, command, teacher, where)
    if flags["json"]:
        print_json({"out": str(out), **found.record, "written": found.merged.summary()})
    else:
        typer.echo(str(out))


def _asked(defaults: Mapping[str, Any], flags: Mapping[str, Any]) -> tuple[Any, str]:
    """The spec, and where the texts are."""
    from ..recipe import read_fields
    from ..train.spec import TrainSpec

    file = flags["spec"]
    named = {} if file is None else read_fields(file)
    given = {name: flags.get(name) for name in (*TrainSpec.model_fields, "quota")}
    given.pop("path")
    given["loss"] = _loss(defaults.get("loss", {}), named.get("loss") or {}, flags)
    for name, value in defaults.items():
        if name not in named and given[name] is None:
            given[name] = value
    return training.build_spec(file, flags["texts"], **given)


def _loss(
    defaults: Mapping[str, Any], named: Any, flags: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The loss of the flags over that of the file (named), over the defaults where neither of them
    names a weight; None when nothing is said.
    """
    from ..recipe import parse_size

    if not isinstance(named, dict):
        raise UsageError(f"loss of the spec must be a mapping, not {type(named).__name__}")
    loss = named | {name: flags[name] for name in _LOSS if flags.get(name) is not None}
    if flags.get("layers") is not None:
        loss["layers"] = parse_pairs(flags["layers"])
    if "cache_size" in loss:
        loss["cache_bytes"] = parse_size(str(loss.pop("cache_size")))
    if not {"ce", "kl", "cosine", "mse", "spans"} & loss.keys():
        # A cache has no hidden states, so the defaults' are left out where one is asked for.
        hidden = ("cosine", "mse") if loss.get("cache") is not None else ()
        loss = {name: value for name, value in defaults.items() if name not in hidden} | loss
    return loss or None


def parse_pairs(text: str) -> str | list[tuple[int, int]]:
    """ "last", "all", or the pairs of "1:3,2:6"."""
    if text in ("last", "all"):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,6}:\d{1,6}", part, re.ASCII) for part in parts):
        raise UsageError(
            f"--layers {text!r} is neither last, nor all, nor pairs student:teacher such as 1:3,2:6"
        )
    return [(int(s), int(t)) for s, _, t in (part.partition(":") for part in parts)]


def _gained(record: Mapping[str, Any]) -> list[str]:
    """What the held-out text says, over all languages and for the one it still costs most."""
    if "after" not in record:
        return []
    before, after = record["before"], record["after"]
    name = "kl" if "kl" in after["all"] else "nll"
    worst = max((lang for lang in after if lang != "all"), key=lambda lang: after[lang][name])
    return [
        f"held-out text, {lang}: "
        + ", ".join(f"{key} {before[lang][key]:.4f} -> {after[lang][key]:.4f}" for key in keys)
        for lang, keys in (("all", _shown(after)), (worst, _shown(after)))
    ]


def _shown(after: Mapping[str, Any]) -> list[str]:
    return [key for key in ("nll", "kl") if key in after["all"]]
