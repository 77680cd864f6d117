"""From texts to rows of token ids that are scored: contiguous windows, or one row per line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..texts import counts, share
from ..tokenizer import check_tokenised, encode, separator


@dataclass(frozen=True)
class Samples:
    """Rows of one language, int64 [tokens] each; a row's first token is context, not scored."""

    language: str
    rows: list[torch.Tensor]
    bytes_per_token: float


def cut_windows(
    texts: Mapping[str, list[str]], tokenizer: Any, *, window: int = 256, tokens: int | None = None
) -> list[Samples]:
    """Consecutive windows over the documents of each language, in file order.

    Documents are joined with BOS before each and the stream is cut every `window` tokens, in the
    middle of documents too; what is left at the end is not scored. tokens caps the total, the same
    for every language. InputError with the counts when a language does not fill one window.
    """
    most = share(tokens, window, len(texts))
    samples, short = [], {}
    for lang, documents in texts.items():
        stream, ratio = _stream(lang, documents, tokenizer, None if most is None else most * window)
        rows = list(stream[: len(stream) // window * window].split(window))[:most]
        if not len(stream) // window:
            short[lang] = len(stream)
        samples.append(Samples(lang, rows, ratio))
    if short:
        raise InputError(
            f"too little text for one window of {window} tokens in {counts(short, int)} tokens"
        )
    return samples


def cut_lines(texts: Mapping[str, list[str]], tokenizer: Any, *, longest: int) -> list[Samples]:
    """One row per line, BOS first where there is one. The texts must be parallel (read_texts says
    so).

    InputError naming the line when one is longer than `longest` tokens or has nothing to score.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    samples = []
    for lang, sentences in texts.items():
        rows = [torch.tensor(bos + ids, dtype=torch.int64) for ids in encode(tokenizer, sentences)]
        check_tokenised(lang, sum(len(row) - len(bos) for row in rows), sum(map(len, sentences)))
        for number, row in enumerate(rows, 1):
            if len(row) < 2 or len(row) > longest:
                raise InputError(
                    f"line {number} of {lang} has {len(row)} tokens; 2 to {longest} can be scored"
                )
        scored = sum(len(row) - len(bos) for row in rows)
        samples.append(Samples(lang, rows, sum(len(s.encode()) for s in sentences) / scored))
    if len({len(s.rows) for s in samples}) > 1:
        raise InputError(
            "parallel texts need as many lines in every language, not "
            + counts({s.language: s.rows for s in samples}, len)
        )
    return samples


def _stream(
    lang: str, documents: list[str], tokenizer: Any, needed: int | None
) -> tuple[torch.Tensor, float]:
    """Token ids of all documents (or the first `needed`) in one row, and the bytes per token."""
    mark = separator(tokenizer)
    ids: list[int] = []
    used = size = characters = 0
    for document in documents:
        (body,) = encode(tokenizer, [document])
        ids += mark + body
        used += len(body)
        size += len(document.encode())
        characters += len(document)
        if needed is not None and len(ids) >= needed:
            break
    check_tokenised(lang, used, characters)
    return torch.tensor(ids, dtype=torch.int64), size / used
