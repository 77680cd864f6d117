"""Calibration windows: where they come from, what is refused, and how they are cut into chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..documents import open_texts
from ..errors import InputError, UsageError
from ..ranks import Parts
from ..recipe import Recipe
from ..texts import check_window, counts
from ..texts import windows as token_windows
from ..tokenizer import check_rows, fingerprint, load_tokenizer
from .ferry import Checks

# Tokens run at once; fixed, so that results do not depend on the memory given. A GPU needs more of
# them to be busy.
CHUNK_TOKENS = 4096
CUDA_CHUNK_TOKENS = 16384
_TOKENS_PER_COLUMN = 4  # fewer calibration tokens per column of a Hessian are worth a warning


@dataclass(frozen=True)
class Calibration:
    """Token windows ids int64 [windows, length] and the language of each window.

    parts: of neighbouring windows, and which of them this process runs. Chunks are counted from the
    first that it runs; no chunk crosses a part. The rest is what the texts told: see texts.Windows.
    """

    ids: torch.Tensor
    languages: list[str]
    tokens_per_language: dict[str, int] = field(default_factory=dict)
    limited_by: str | None = None
    fertility: dict[str, float] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    chunk_tokens: int | None = None  # None: CHUNK_TOKENS
    empty: dict[str, int] = field(default_factory=dict)
    one_token: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None  # fingerprint of the one that cut the texts
    parts: Parts = field(default_factory=Parts)

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def notices(self, columns: int = 0) -> list[str]:
        """What is to be told of it before it is used, for Hessians of so many columns (0: none)."""
        odd = {
            "documents that repeat an earlier one": self.duplicates,
            "documents without any text, left out": self.empty,
            "documents of a single token": self.one_token,
        }
        told = [f"{what}: {counts(found, int)}" for what, found in odd.items() if found]
        if self.limited_by is not None:
            told.append(f"the texts in {self.limited_by} ran out before the tokens asked for")
        if self.left_out:
            told.append("no calibration tokens are left for " + ", ".join(sorted(self.left_out)))
        if self.tokens < _TOKENS_PER_COLUMN * columns:
            told.append(
                f"{self.tokens} calibration tokens are few for Hessians of {columns} columns; "
                f"{_TOKENS_PER_COLUMN * columns} or more are advised"
            )
        return told

    @property
    def own_tokens(self) -> int:
        """Those that this process runs."""
        return sum(s.stop - s.start for s in self._own) * self.ids.shape[1]

    def in_parts(self, count: int) -> Calibration:
        """The same in so many parts, dealt out among the ranks."""
        return replace(self, parts=Parts.dealt(count))

    def chunks(self) -> Iterator[torch.Tensor]:
        """Consecutive windows, chunk_tokens tokens (at least one window) at a time."""
        return (self.ids[here] for here in self._own)

    def windows(self, chunk: int) -> slice:
        """The windows of a chunk, counted over all windows."""
        return self._own[chunk]

    def closes(self, chunk: int) -> bool:
        """Whether a part ends with this chunk."""
        return self._own[chunk].stop in {span.stop for span in self._spans}

    @property
    def own_parts(self) -> list[range]:
        """The chunks of each part that this process runs."""
        found: list[range] = []
        for part in self.parts.own:
            span = self._spans[part]
            inside = [i for i, s in enumerate(self._own) if span.start <= s.start < span.stop]
            found.append(range(inside[0], inside[-1] + 1))
        return found

    def of_every_part(self) -> list[list[slice]]:
        """The windows of every chunk of every part, whichever process runs it."""
        return [self._places(range(part, part + 1)) for part in range(self.parts.count)]

    @property
    def first_chunk(self) -> int:
        """How many chunks other processes run before the first of this one."""
        return len(self._places(range(self.parts.own.start)))

    @property
    def chunk_count(self) -> int:
        """Chunks of all processes."""
        return len(self._places(range(self.parts.count)))

    @cached_property
    def _own(self) -> list[slice]:
        return self._places(self.parts.own)

    @cached_property
    def _spans(self) -> list[slice]:
        """The windows of each part; sizes differ by one at most."""
        count, parts = len(self.ids), self.parts.count
        ends = [count * part // parts for part in range(parts + 1)]
        return [slice(a, b) for a, b in pairwise(ends)]

    def _places(self, parts: range) -> list[slice]:
        """The windows of every chunk of some parts."""
        each, found = self.windows_per_chunk, []
        for part in parts:
            span = self._spans[part]
            for start in range(span.start, span.stop, each):
                found.append(slice(start, min(start + each, span.stop)))
        return found

    @property
    def windows_per_chunk(self) -> int:
        return max(1, (self.chunk_tokens or CHUNK_TOKENS) // self.ids.shape[1])

    def language(self, chunk: int, window: int) -> str:
        """Language of a window of a chunk."""
        return self.languages[self.windows(chunk).start + window]


def load_calibration(texts: Any, recipe: Recipe, checkpoint: Checkpoint) -> Calibration:
    """Calibration from token windows, or from a folder of texts cut by the model's own tokenizer.

    texts: an object with ids and languages (as texts.windows returns), a folder, or None for the
    folder named in the recipe. Raises UsageError for no texts or windows longer than the model's
    positions, InputError for texts that cannot be used, no windows, windows of one token, wrong
    shapes, and token numbers the embedding does not have.
    """
    if texts is None:
        texts = recipe.calibration.path
    if texts is None:
        raise UsageError(f"method {recipe.method} needs calibration texts and none are given")
    windows = _cut(Path(texts), recipe, checkpoint) if isinstance(texts, (str, Path)) else texts
    ids, languages = windows.ids, list(windows.languages)
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[0] != len(languages):
        raise InputError(
            f"calibration windows must be int64 [windows, length] with one language each; "
            f"got {ids.dtype} {list(ids.shape)} and {len(languages)} languages"
        )
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError(
            f"the calibration texts give {ids.shape[0]} windows of {ids.shape[1]} tokens; too few"
        )
    for token in (int(ids.min()), int(ids.max())):
        check_rows(token, checkpoint.config.vocab_size, "the calibration windows use token")
    return Calibration(
        ids.contiguous(),
        languages,
        {lang: n * ids.shape[1] for lang, n in Counter(languages).items()},
        getattr(windows, "limited_by", None),
        getattr(windows, "fertility", {}),
        getattr(windows, "duplicates", {}),
        getattr(windows, "bytes_per_token", {}),
        getattr(windows, "left_out", []),
        empty=getattr(windows, "empty", {}),
        one_token=getattr(windows, "one_token", {}),
        tokenizer=fingerprint(checkpoint.folder) if windows is not texts else None,
    )


def _cut(folder: Path, recipe: Recipe, checkpoint: Checkpoint) -> Any:
    wanted = recipe.calibration
    check_window(wanted.window, checkpoint.config)
    return token_windows(
        open_texts(folder),
        load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size),
        tokens=wanted.tokens,
        window=wanted.window,
        seed=wanted.seed,
        quotas=wanted.quotas,
    )


def check_activations(
    x: torch.Tensor, chunk: int, where: str, calibration: Calibration, checks: Checks
) -> None:
    """InputError naming layer and language when x [windows, length, columns] is not finite.

    For where checks are late; elsewhere left_out.LeftOut leaves such windows out.
    """

    def judge(least: torch.Tensor, greatest: torch.Tensor) -> None:
        bad = ~(least.isfinite() & greatest.isfinite())
        if bool(bad.any()):
            window = int(bad.nonzero()[0])
            raise InputError(
                f"the input of {where} is not finite for a calibration window in language "
                f"{calibration.language(chunk, window)!r}; the model overflows in its dtype"
            )

    checks.expect(judge, *x.detach().flatten(1).aminmax(dim=1))
