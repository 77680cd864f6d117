"""`distaya generate`: let a model go on with a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Draw tokens with this seed; the likeliest are taken without it."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Used with --seed.")] = 0.8,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    exact: options.Exact = False,
    offline: options.Offline = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Go on with PROMPT, greedily or (with --seed) by drawing."""
    from ..evaluate import load
    from ..measure.speed import Stopwatch
    from ..runtime import resident_bytes
    from .output import print_json, size

    loaded = load(model, dtype=dtype, device=device, offline=offline, exact=exact)
    watch = Stopwatch()
    text = go_on(
        loaded,
        prompt,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        watch=watch,
    )
    speed, resident = watch.speed(), resident_bytes(loaded.model)
    if json:
        found = {"model": model, "prompt": prompt, "continuation": text, "seed": seed}
        rates = {
            "prompt_tokens": speed.prompt,
            "new_tokens": speed.new,
            "prefill_tokens_per_second": speed.prefill_rate,
            "decode_tokens_per_second": speed.decode_rate,
            "resident_bytes": resident,
        }
        print_json(found | rates)
        return
    typer.echo(prompt + text)
    decode = "-" if speed.decode_rate is None else f"{speed.decode_rate:.1f}"
    typer.echo(
        f"{speed.new} tokens at {decode} tokens/s after a prompt of {speed.prompt} in "
        f"{speed.prefill:.2f} s; {size(resident)} of weights in memory",
        err=True,
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

    from ..checkpoint.whole import quiet_transformers
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
    row = torch.tensor([ids], device=next(loaded.model.parameters()).device)
    drawing = {} if seed is None else {"temperature": temperature, "top_k": 0, "top_p": 0.95}
    with quiet_transformers(), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed or 0)
        out = loaded.model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=max_new_tokens,
            do_sample=seed is not None,
            pad_token_id=loaded.tokenizer.pad_token_id or 0,
            streamer=watch,
            **drawing,
        )
    return loaded.tokenizer.decode(out[0, row.shape[1] :], skip_special_tokens=True)
