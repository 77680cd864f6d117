"""`distaya finetune`: a model goes on learning."""

from __future__ import annotations

import typer

from . import options, training


def finetune(
    model: options.Model,
    out: training.Out,
    texts: training.Texts = None,
    spec: training.Spec = None,
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
    """Train MODEL on texts or chats and write it to OUT in its own format.

    Pruned weights stay 0 and quantised ones keep their codes. A run that was stopped goes on when
    the same command is given again.
    """
    asked, where = training.build_spec(
        spec,
        texts,
        train=train,
        also=also,
        rank=rank,
        steps=steps,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        micro_tokens=micro_tokens,
        window=window,
        tokens=tokens,
        quota=quota,
        held_out=held_out,
        evaluate_every=evaluate_every,
        save_every=save_every,
        seed=seed,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        shard=shard,
        parts=parts,
    )
    from ..ranks import team
    from ..train.finetune import finetune as run
    from .output import print_json

    with training.TrainReporter(quiet) as reporter:
        found = run(
            model,
            out,
            where,
            asked,
            device=device,
            offline=offline,
            overwrite=overwrite,
            on_event=reporter.on_event,
        )
        if not team().first:
            return
        training.told(reporter, found)
    if json:
        print_json({"out": str(out), **found.record, "written": found.merged.summary()})
    else:
        typer.echo(str(out))
