"""How a compressed model differs from its base on test windows: NLL, KL, first choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

LOGIT_BYTES = 32 << 20  # float32 logits of one model held at once


@dataclass(frozen=True)
class Language:
    """One language. nll, delta, kl in nats per token; agreement: share of equal first choices.

    windows [n]: delta of every window, which the bootstrap draws from.
    """

    nll: float
    delta: float
    kl: float
    kl_p99: float
    agreement: float
    windows: list[float]


@dataclass(frozen=True)
class Scores:
    """All languages; nll, delta, kl, agreement are means over languages, each weighing the same.

    kl_p99: the 99th percentile over all tokens.
    """

    languages: dict[str, Language]
    kl_p99: float

    def mean(self, name: str) -> float:
        return sum(getattr(x, name) for x in self.languages.values()) / len(self.languages)


class _Remembered(nn.Module):
    """Stands where the decoder was and returns the hidden states it once gave."""

    def forward(self, *_args, **_kwargs):
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


class Base:
    """The uncompressed model on the test windows: scored once, its last hidden states kept.

    Its layers are given up afterwards; its head makes the logits again where they are compared,
    bit for bit those of the whole model, without holding [tokens, vocabulary] of all windows.
    """

    @torch.inference_mode()
    def __init__(self, model, test: dict[str, Tensor]):
        """model: a causal language model in eval mode, which is no longer whole afterwards."""
        self.test = test
        self.vocabulary = model.config.vocab_size
        self._model = model
        self._hidden: dict[str, Tensor] = {}
        self.nll: dict[str, Tensor] = {}
        seen: list[Tensor] = []
        hook = model.model.register_forward_hook(
            lambda _m, _a, out: seen.append(out.last_hidden_state)
        )
        each: dict[str, list[Tensor]] = {lang: [] for lang in test}
        for lang, start, ids in self.batches():
            logits = model(input_ids=ids, use_cache=False).logits
            self._keep(lang, start, seen.pop())
            each[lang] += [_nll(row, w) for row, w in zip(logits, ids, strict=True)]
        hook.remove()
        model.model = _Remembered()
        self.nll = {lang: torch.stack(rows) for lang, rows in each.items()}

    def _keep(self, lang: str, start: int, hidden: Tensor) -> None:
        """Into one block a language: kept one by one they hold the heap around them too."""
        if lang not in self._hidden:
            self._hidden[lang] = hidden.new_empty(len(self.test[lang]), *hidden.shape[1:])
        self._hidden[lang][start : start + len(hidden)] = hidden

    def batches(self) -> Iterator[tuple[str, int, Tensor]]:
        """(language, first window, ids [n, length]), as many windows as the logits leave room."""
        for lang, ids in self.test.items():
            size = max(1, LOGIT_BYTES // (4 * self.vocabulary * ids.shape[1]))
            for start in range(0, len(ids), size):
                yield lang, start, ids[start : start + size]

    def logits(self, lang: str, start: int, ids: Tensor) -> Tensor:
        """What the whole base model gave for this batch, [n, length, vocabulary]."""
        self._model.model.hidden = self._hidden[lang][start : start + len(ids)]
        return self._model(input_ids=ids, use_cache=False).logits


@torch.inference_mode()
def score(model, base: Base) -> Scores:
    """Judge a model in eval mode on the test windows of `base`."""
    sums: dict[str, list[Tensor]] = {lang: [] for lang in base.test}
    kls: dict[str, list[Tensor]] = {lang: [] for lang in base.test}
    for lang, start, ids in base.batches():
        logits = model(input_ids=ids, use_cache=False).logits
        before = base.logits(lang, start, ids)
        for old, new, window in zip(before, logits, ids, strict=True):
            P, Q = (torch.log_softmax(x[:-1].float(), dim=-1) for x in (old, new))
            kl = (P.exp() * (P - Q)).sum(-1).clamp_min_(0.0)
            same = (P.argmax(-1) == Q.argmax(-1)).double().mean()
            nll = -Q.gather(1, window[1:, None]).double().mean()
            sums[lang].append(torch.stack([nll, kl.double().mean(), same]))
            kls[lang].append(kl)
    languages = {
        lang: _language(torch.stack(rows), base.nll[lang], torch.cat(kls[lang]))
        for lang, rows in sums.items()
    }
    tokens = torch.cat([kl for rows in kls.values() for kl in rows])
    return Scores(languages, _p99(tokens))


def _nll(logits: Tensor, window: Tensor) -> Tensor:
    log = torch.log_softmax(logits[:-1].float(), dim=-1)
    return -log.gather(1, window[1:, None]).double().mean()


def _language(rows: Tensor, base: Tensor, kl: Tensor) -> Language:
    """rows [windows, 3]: nll, kl, share of equal first choices."""
    nll, mean, same = rows.mean(0).tolist()
    delta = rows[:, 0] - base
    return Language(nll, float(delta.mean()), mean, _p99(kl), same, delta.tolist())


def _p99(values: Tensor) -> float:
    """Order statistic: torch.quantile takes no more than 2^24 values."""
    return float(values.kthvalue(max(1, -(-len(values) * 99 // 100)))[0])
