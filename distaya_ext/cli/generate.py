"""`distaya generate`: let a model go on with a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import options

if TYPE_CHECKING:
    from ..evaluate import Loaded
    from ..measure.speed import Stopwatch


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on with.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 60,
    against: Annotated[
        str | None, typer.Option(help="Dense model that goes on with the same text, to compare.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Draw tokens with this seed; the likeliest are taken without it."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Used with --seed.")] = 0.8,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    exact: options.Exact = False,
    strict: options.StrictKernels = False,
    offline: options.Offline = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Go on with PROMPT, greedily or (with --seed) by drawing."""
    from ..evaluate import load
    from .output import kernels_told, print_json

    results = []
    for name in [model] if against is None else [model, against]:
        with kernels_told(strict):
            loaded = load(name, dtype=dtype, device=device, offline=offline, exact=exact)
        found = _timed(
            loaded, prompt, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature
        )
        results.append({"model": name, "prompt": prompt, "seed": seed, **found})
        if not json:
            typer.echo(prompt + found["continuation"])
            typer.echo(_line(found), err=True)
        del loaded
    if json:
        first, *others = results
        print_json(first | ({"against": others[0]} if others else {}))


def _timed(loaded: Loaded, prompt: str, **options: Any) -> dict[str, Any]:
    """The continuation, its speed, and the bytes of the weights."""
    from ..measure.speed import Stopwatch
    from ..runtime import dense_bytes, resident_bytes

    watch = Stopwatch()
    text = go_on(loaded, prompt, watch=watch, **options)
    speed = watch.speed()
    return {
        "continuation": text,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "prompt_tokens": speed.prompt,
        "new_tokens": speed.new,
        "prefill_tokens_per_second": speed.prefill_rate,
        "decode_tokens_per_second": speed.decode_rate,
        "resident_bytes": resident_bytes(loaded.model),
        "dense_bytes": dense_bytes(loaded.model),
    }


def _line(found: dict[str, Any]) -> str:
    from .output import size

    prefill, decode = (
        "-" if rate is None else f"{rate:.1f}"
        for rate in (found["prefill_tokens_per_second"], found["decode_tokens_per_second"])
    )
    resident, dense = found["resident_bytes"], found["dense_bytes"]
    beside = f" ({size(dense)} if dense in {found['dtype']})" if dense != resident else ""
    return (
        f"prompt of {found['prompt_tokens']} at {prefill} tokens/s, {found['new_tokens']} new at "
        f"{decode} tokens/s; {size(resident)} of weights in memory{beside}"
    )


def go_on(
    loaded: Loaded,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int | None = None,
    temperature: float = 0.8,
    watch: Stopwatch | None = None,
) -> str:
    """The continuation alone, timed by `watch`. torch's global random state is left as it was."""
    import torch

    from ..evaluate.continuations import write
    from ..tokenizer import encode

    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the shell that were no UTF-8
        raise UsageError(f"the prompt is not UTF-8 text at character {error.start}") from None
    bos = loaded.tokenizer.bos_token_id
    (ids,) = encode(loaded.tokenizer, [prompt])
    ids = ([] if bos is None else [bos]) + ids
    if not ids:
        raise UsageError("the prompt is empty and the model has no token to begin with")
    room = getattr(loaded.model.config, "max_position_embeddings", None)
    if room is not None and len(ids) + max_new_tokens > room:
        raise UsageError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's {room} "
            "positions"
        )
    if seed is not None and not temperature > 0:
        raise UsageError(f"temperature must be above 0 to draw tokens, not {temperature:g}")
    (new,) = write(
        loaded,
        torch.tensor([ids]),
        max_new_tokens,
        seed=seed,
        temperature=temperature,
        streamer=watch,
    )
    return loaded.tokenizer.decode(new, skip_special_tokens=True)
