"""evaluate(): texts and one or two models in, an Evaluation out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..ranks import team
from ..texts import check_window, read_texts
from ..tokenizer import check_rows
from .continuations import (
    CONTINUATIONS,
    NEW_TOKENS,
    Prompt,
    beginnings,
    prompts_of_first,
    side_by_side,
    speak,
    wrong_script,
)
from .dealt import from_first, score_all
from .load import Loaded, check_same_vocabulary, load
from .result import Evaluation, LanguageResult
from .samples import Samples, cut_lines, cut_windows
from .score import Scores
from .statistics import interval

# (tokens scored so far, tokens in all, language at work)
OnProgress = Callable[[int, int, str], None]

_LONGEST_LINE = 8192


def evaluate(
    model: str | Path,
    texts: str | os.PathLike | Mapping[str, list[str]],
    *,
    against: str | Path | None = None,
    window: int = 256,
    tokens: int | None = None,
    per_line: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    on_progress: OnProgress | None = None,
    offline: bool = False,
    exact: bool = False,
    continuations: int = CONTINUATIONS,
    new_tokens: int = NEW_TOKENS,
) -> Evaluation:
    """Score a model per language on a TEXTS folder (or texts already read), paired with a base if
    given.

    Windows of `window` consecutive tokens are scored; with per_line each line is a sample and the
    texts must be parallel. tokens caps the total over languages (windows only). Both also go on
    greedily with the beginnings of `continuations` texts of each language (0: none), `new_tokens`
    each, which is where wrong scripts show. Model and base are both in memory; exact gives packed
    ones full-precision activations on the CPU too. Raises InputError and UsageError in one
    sentence.
    """
    if team().first and not isinstance(texts, Mapping):
        texts = read_texts(texts, parallel=per_line)
    how = {"dtype": dtype, "device": device, "offline": offline, "exact": exact}
    loaded, base = load(model, **how, together=True), None
    if against is not None:
        base = load(against, **how, together=True)
        check_same_vocabulary(loaded, base)
    if not per_line:
        check_window(window, loaded.model.config)

    def cut() -> list[Samples]:
        if per_line:
            return cut_lines(texts, loaded.tokenizer, longest=_longest(loaded))
        return cut_windows(texts, loaded.tokenizer, window=window, tokens=tokens)

    def begin() -> list[Prompt]:
        return beginnings(texts, loaded, continuations, new_tokens) if continuations else []

    samples, prompts = from_first(cut), prompts_of_first(begin)
    (found,) = evaluate_loaded(
        [loaded], samples, base=base, window=None if per_line else window, on_progress=on_progress
    )
    if not prompts:
        return found
    return with_continuations(
        found, loaded, prompts, base=base, new_tokens=new_tokens, on_progress=on_progress
    )


def with_continuations(
    found: Evaluation,
    loaded: Loaded,
    prompts: Sequence[Prompt],
    *,
    base: Loaded | None = None,
    new_tokens: int = NEW_TOKENS,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """An evaluation with what model and base write after the prompts, and in which scripts."""
    start = time.perf_counter()
    total, done = len(prompts) * (2 if base is not None else 1), 0

    def advance(count: int, language: str) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total, language)

    before = None if base is None else speak(base, prompts, new_tokens, advance)
    after = speak(loaded, prompts, new_tokens, advance)
    rows, unknown = [], []
    for row in found.languages:
        script = wrong_script(row.language, after, before)
        if script is None:
            unknown.append(row.language)
            rows.append(row)
            continue
        rows.append(
            replace(
                row,
                continuations=script.prompts,
                wrong_script=script.share,
                base_wrong_script=script.base,
                wrong_script_delta=script.delta,
                wrong_script_interval=script.interval,
            )
        )
    seconds = team().tell(time.perf_counter() - start)
    notes = list(found.notes)
    if unknown:
        notes.append(
            f"wrong scripts were not measured for {', '.join(unknown)}: it is not known which "
            "scripts are right"
        )
    most = max((row.continuations or 0 for row in rows), default=0)
    return replace(
        found,
        languages=rows,
        seconds=found.seconds + seconds,
        notes=notes,
        samples=side_by_side(after, before),
        written={
            "per_language": most, "new_tokens": new_tokens, "seconds": round(seconds, 3)
        },
    )  # fmt: skip


def evaluate_loaded(
    models: Sequence[Loaded],
    samples: Sequence[Samples],
    *,
    base: Loaded | None = None,
    window: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[Evaluation]:
    """Score models already in memory on samples already cut, one Evaluation each.

    With a base its forward pass is shared by all of them. window None means the rows are parallel
    lines. Under ranks all of them call this with the same samples and get the same Evaluations.
    """
    start = time.perf_counter()
    networks = [m.model for m in ([base] if base else []) + list(models)]
    # Without a base nothing is compared, so each model is scored as if it were the first.
    groups = [networks] if base is not None else [[network] for network in networks]
    total, done = sum(len(row) - 1 for s in samples for row in s.rows), 0
    _check_ids(models[0], samples)

    def advance(count: int, language: str) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total, language)

    scores = score_all(groups, samples, advance)
    seconds = team().tell(time.perf_counter() - start)
    return [
        Evaluation(
            model=model.name,
            base=base.name if base else None,
            languages=_languages(samples, scores, which, base is not None, window is None),
            mode="lines" if window is None else "windows",
            window=window,
            seconds=seconds,
        )
        for which, model in enumerate(models, start=1 if base else 0)
    ]


def _languages(
    samples: Sequence[Samples], scores: list[list[Scores]], which: int, paired: bool, parallel: bool
) -> list[LanguageResult]:
    """Results of model `which`, worst first. scores[language][model], base first if paired."""
    english = None
    if paired and parallel:
        english = next(
            (
                s[which].nll - s[0].nll
                for s, sample in zip(scores, samples, strict=True)
                if sample.language == "en"
            ),
            None,
        )
    rows = [
        _language(sample, s[which], s[0] if paired else None, parallel, english)
        for sample, s in zip(samples, scores, strict=True)
    ]
    return sorted(rows, key=lambda r: (-(r.dnll if paired else r.nll), r.language))


def _language(
    sample: Samples, own: Scores, base: Scores | None, parallel: bool, english: np.ndarray | None
) -> LanguageResult:
    tokens = own.tokens.sum()
    to_bits = 1.0 / (math.log(2) * sample.bytes_per_token)
    nll = own.nll.sum() / tokens
    plain = {
        "language": sample.language,
        "samples": len(sample.rows),
        "tokens": int(tokens),
        "nll": float(nll),
        "bits_per_byte": float(nll * to_bits),
        "nll_interval": interval(own.nll, own.tokens),
    }
    if base is None:
        return LanguageResult(**plain)
    delta = own.nll - base.nll
    dnll, base_nll = float(delta.sum() / tokens), float(base.nll.sum() / tokens)
    each: dict = {}
    if parallel:
        each["sentence_dnll"] = float(delta.mean())
    if english is not None and sample.language != "en":
        over, ones = delta - english, np.ones(len(delta))
        each |= {"over_english": float(over.mean()), "over_english_interval": interval(over, ones)}
    return LanguageResult(
        **plain,
        base_nll=base_nll,
        base_bits_per_byte=base_nll * to_bits,
        dnll=dnll,
        dnll_interval=interval(delta, own.tokens),
        ppl_ratio=math.exp(min(dnll, 700.0)),
        kl=float(own.kl.sum() / tokens),
        kl_p99=float(np.quantile(own.kl_tokens, 0.99)),
        agreement=float(own.same.sum() / tokens),
        **each,
    )


def _longest(loaded: Loaded) -> int:
    return min(
        _LONGEST_LINE, getattr(loaded.model.config, "max_position_embeddings", _LONGEST_LINE)
    )


def _check_ids(model: Loaded, samples: Sequence[Samples]) -> None:
    highest = max(int(row.max()) for sample in samples for row in sample.rows)
    check_rows(highest, model.vocabulary, f"the texts use, in the tokenizer of {model.name}, token")
