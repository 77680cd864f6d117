"""What models write by themselves: greedy continuations of the beginnings of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import UsageError
from ..ranks import jobs_of, team
from ..tokenizer import check_rows, encode
from .dealt import Meter
from .load import Loaded
from .scripts import Letters, letters, scripts_of
from .statistics import difference_interval

CONTINUATIONS = 8  # texts of each language that are gone on with
NEW_TOKENS = 24
_PROMPT = 16  # tokens of a text, beside BOS; of a shorter one half of it
_ROWS = 32  # prompts that run together
_BEGINNING = 1024  # characters of a text that are tokenised: more than enough for a prompt


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text, BOS in front where there is one: int64 [tokens]."""

    language: str
    text: str
    ids: torch.Tensor


@dataclass(frozen=True)
class Spoken:
    """What a model wrote: one text per prompt, in the order of the prompts."""

    prompts: Sequence[Prompt]
    texts: list[str]

    def letters(self, language: str, scripts: tuple[str, ...]) -> list[Letters]:
        """Counted letters of each continuation of a language."""
        pairs = zip(self.prompts, self.texts, strict=True)
        return [letters(text, scripts) for p, text in pairs if p.language == language]


@dataclass(frozen=True)
class WrongScript:
    """Share of letters outside a language's scripts, pooled over its continuations; base, delta and
    interval (of delta, 95 %, paired by prompt) are None without a base, all but `prompts` where no
    letter was written.
    """

    prompts: int
    share: float | None
    base: float | None = None
    delta: float | None = None
    interval: tuple[float, float] | None = None


def beginnings(
    texts: Mapping[str, Sequence[str]], loaded: Loaded, count: int, new_tokens: int
) -> list[Prompt]:
    """Prompts from the first `count` texts of each language that have two tokens or more.

    UsageError where `new_tokens` after the shortest prompt exceed the model's positions.
    """
    bos = [] if loaded.tokenizer.bos_token_id is None else [loaded.tokenizer.bos_token_id]
    room = getattr(loaded.model.config, "max_position_embeddings", None)
    most = _PROMPT if room is None else min(_PROMPT, room - new_tokens - len(bos))
    if most < 1:
        raise UsageError(
            f"{new_tokens} new tokens leave no prompt any of the model's {room} positions"
        )
    prompts = []
    for language, documents in texts.items():
        taken = 0
        for ids in _tokenised(documents, loaded.tokenizer):
            if taken == count:
                break
            if len(ids) < 2:
                continue
            ids = ids[: min(most, len(ids) // 2)]
            check_rows(max(ids), loaded.vocabulary, f"{language} begins with token")
            text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
            prompts.append(Prompt(language, text.rstrip("\ufffd"), torch.tensor(bos + ids)))
            taken += 1
    return prompts


def prompts_of_first(make: Callable[[], list[Prompt]]) -> list[Prompt]:
    """The prompts that rank 0 makes, on every rank."""
    us = team()
    if us.alone:
        return make()
    made = make() if us.first else []
    told = us.tell([(p.language, p.text, p.ids.tolist()) for p in made])
    return [Prompt(language, text, torch.tensor(ids)) for language, text, ids in told]


def speak(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    new_tokens: int,
    on_done: Callable[[int, str], None] = lambda count, language: None,
) -> Spoken:
    """Greedy continuations of at most `new_tokens` tokens each, the same in every run.

    Prompts of one length run together, whatever their language, so that none is padded. Ranks deal
    the batches out and all get everything.
    """
    us, cut = team(), list(_batches(prompts))
    # A step reads all weights, however few prompts run together.
    dealt = jobs_of([_ROWS + len(batch) for batch in cut], us.world)
    own = [cut[number] for number in dealt[us.rank]]
    meter = Meter(len(prompts), sum(map(len, own)), on_done)
    texts: list[tuple[int, str]] = []
    for batch in own:
        rows = torch.stack([prompts[i].ids for i in batch])
        for i, ids in zip(batch, write(loaded, rows, new_tokens), strict=True):
            texts.append((i, loaded.tokenizer.decode(ids, skip_special_tokens=True)))
        meter.advance(len(batch), prompts[batch[-1]].language)
    every = dict(pair for of_rank in us.gather(texts) for pair in of_rank)
    return Spoken(prompts, [every[i] for i in range(len(prompts))])


def write(
    loaded: Loaded,
    rows: torch.Tensor,
    new_tokens: int,
    *,
    seed: int | None = None,
    temperature: float = 0.8,
    streamer: Any = None,
) -> list[torch.Tensor]:
    """New tokens after each of the rows, int64 [rows, tokens] without padding, up to where the
    model ends. Greedy, or drawn with a seed; torch's global random state is left as it was.
    """
    from ..checkpoint.whole import quiet_transformers

    rows = rows.to(next(loaded.model.parameters()).device)
    drawing = {} if seed is None else {"temperature": temperature, "top_k": 0, "top_p": 0.95}
    with quiet_transformers(), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed or 0)
        out = loaded.model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=new_tokens,
            do_sample=seed is not None,
            num_beams=1,
            pad_token_id=loaded.tokenizer.pad_token_id or 0,
            streamer=streamer,
            **drawing,
        )
    ends = _ends(loaded)
    return [_until(row, ends) for row in out[:, rows.shape[1] :].cpu()]


def wrong_script(language: str, model: Spoken, base: Spoken | None) -> WrongScript | None:
    """How much of what was written in a language is in other scripts; None when it is not known
    which those are, or there is no continuation.
    """
    scripts = scripts_of(language)
    own = model.letters(language, scripts) if scripts else []
    if not own:
        return None
    share = _share(own)
    if base is None:
        return WrongScript(len(own), share)
    before = base.letters(language, scripts)
    of_base = _share(before)
    if share is None or of_base is None:
        return WrongScript(len(own), share, of_base)
    columns = [np.array(column, float) for column in (*zip(*own, strict=True),)]
    others = [np.array(column, float) for column in (*zip(*before, strict=True),)]
    found = difference_interval(columns[1], columns[0], others[1], others[0])
    return WrongScript(len(own), share, of_base, share - of_base, found)


def side_by_side(model: Spoken, base: Spoken | None) -> list[dict[str, Any]]:
    """The continuations as they are kept: language, prompt, base (None without one), model."""
    others = base.texts if base is not None else [None] * len(model.texts)
    return [
        {"language": prompt.language, "prompt": prompt.text, "base": before, "model": after}
        for prompt, before, after in zip(model.prompts, others, model.texts, strict=True)
    ]


def _share(counted: Sequence[Letters]) -> float | None:
    total = sum(counted, Letters(0, 0))
    return total.wrong / total.all if total.all else None


def _tokenised(documents: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    for document in documents:
        yield encode(tokenizer, [document[:_BEGINNING]])[0]


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == _ROWS or len(prompts[i].ids) != len(prompts[batch[0]].ids)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _ends(loaded: Loaded) -> torch.Tensor:
    config = getattr(loaded.model, "generation_config", None)
    told = getattr(config, "eos_token_id", None)
    return torch.tensor([told] if isinstance(told, int) else told or [], dtype=torch.int64)


def _until(ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The tokens before the first end: what stands behind it is padding of the batch."""
    at = torch.isin(ids, ends).nonzero()
    return ids[: int(at[0, 0])] if len(at) else ids
