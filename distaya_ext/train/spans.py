"""The loss of a student whose tokenizer is not its teacher's, on spans of bytes that both share.

Position t of one is not position t of the other, so nothing is compared token by token. Two things
can be compared at the byte boundaries that both tokenizers have (see align):

* the probability of a span's bytes, the product over its tokens: approximate likelihood matching
  (Minixhofer, Vulic and Ponti 2025, arXiv 2503.20083), the span treated as a yes-or-no event;
* what comes next: the teacher's distribution over its tokens, each carried to the token with which
  the student would begin to write the same bytes. It says something of every word that could
  follow, not of the one that did.

Both are approximate for one reason: a tokenizer's choice of where to cut tells of what follows. A
model that has just written "th" knows that "the" does not stand here, or it would have been one
token; so p(bytes | tokens before) is not quite p(bytes | bytes before), and differently for both.
Boundaries that both tokenizers have are mostly starts of words, where that matters least.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..errors import UsageError
from .data import IGNORED
from .head import chunked_logits, final_hidden, head_logits
from .objective import Batch
from .pairs import Pairs
from .spec import LossSpec

TAU = 10.0  # spans of several tokens have small probabilities; p^(1 / tau) spreads them over (0, 1)
_KEPT_BYTES = 256 << 20  # of what the teacher says of all rows, where it is kept
_LOG_2 = 0.6931471805599453
_NEARLY_ONE = {torch.float32: 1e-7, torch.float64: 1e-15}  # 1 - p below which p counts as this


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, float32 or float64 of any shape, exact to a few ulp at both ends
    (Maechler 2012).
    """
    near = x > -_LOG_2  # to 0, where 1 - exp(x) cancels
    small = torch.where(near, x, -_LOG_2)
    large = torch.where(near, -_LOG_2, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def binary_divergence(log_p: torch.Tensor, log_q: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """tau KL(Bernoulli(p^(1/tau)) || Bernoulli(q^(1/tau))) in nats of every span.

    log_p of the teacher, log_q of the student: float32 or float64, at most 0, of one shape. The
    factor keeps the gradient's size: for large tau it is (1 - log p / log q) of cross entropy's.
    """
    nearly = -_NEARLY_ONE[log_q.dtype]
    p, q = (log_p / tau).clamp(max=nearly), (log_q / tau).clamp(max=nearly)
    yes = p.exp() * (p - q)
    no = -torch.expm1(p) * (log1mexp(p) - log1mexp(q))
    return tau * (yes + no)


def carried(logits: torch.Tensor, first: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The teacher's next-token distribution over the student's tokens, [positions, vocabulary].

    logits  of the teacher, float [positions, teacher's vocabulary]
    first   int64 [up to teacher's vocabulary]: with which of its tokens the student begins to write
            each token of the teacher's; -1 where it has no such bytes (marks), which are left out
            and their probability shared among the others
    """
    known = (first >= 0).nonzero()[:, 0]
    P = torch.softmax(logits[:, known], dim=-1)
    total = P.new_zeros(vocabulary, len(P)).index_add_(0, first[known], P.t())
    return total.t()


def distribution_divergence(P: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(P || q) in nats [positions]; P probabilities and log_q [positions, vocabulary]."""
    return (torch.special.xlogy(P, P) - P * log_q).sum(dim=-1)


class SpanObjective:
    """(ce CE + spans S) / (ce + spans), per label of the student.

    CE is the cross entropy with the text. S is, summed over the spans and divided by the labels
    like CE (so that a step does not depend on how it is split), KL(teacher's next token, carried to
    the student's vocabulary || student) where the span begins, and `binary` times
    binary_divergence(span's log p of teacher and student).

    teacher  a model in evaluation mode, on the student's device
    pairs    of pairs.paired_data, for the rows of the batches; UsageError where the teacher has
             fewer positions than one of them
    """

    modules = None

    def __init__(
        self, teacher: Any, pairs: Pairs, loss: LossSpec, *, binary: float = 0.3, tau: float = TAU
    ):
        if not loss.spans:
            raise ValueError("the weight of spans is 0")
        longest = max(map(len, pairs.teacher))
        room = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and longest > room:
            raise UsageError(
                f"a row of the student's window takes {longest} tokens of the teacher, whose "
                f"positions are {room}; give a smaller window"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.pairs, self.binary, self.tau = pairs, binary, tau
        self.ce, self.spans = loss.ce, loss.spans
        self.identity = (
            f"spans {loss.spans:g} (binary {binary:g}, tau {tau:g}), ce {loss.ce:g}, "
            f"pairs {pairs.digest()}"
        )
        self._first: torch.Tensor | None = None
        self._kept: dict[int, _Said] = {}

    def __call__(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Terms "ce", "next", "binary", "loss" and "count"; see Objective."""
        spans = _Spans(self.pairs, batch.rows.tolist(), batch.ids.device)
        learnt = batch.labels[:, 1:] != IGNORED
        said = self._teacher(batch, spans, model.config.get_text_config().vocab_size)
        hidden = final_hidden(model, batch.ids)[:, :-1]
        width = hidden.shape[1]
        targets = batch.ids[:, 1:].reshape(-1)
        # Which span begins at each position of the student; -1 where none does.
        begins = torch.full((hidden.shape[0] * width,), -1, device=hidden.device)
        begins[spans.row * width + spans.table[:, 2] - 1] = torch.arange(
            len(spans.row), device=hidden.device
        )

        def each(logits: torch.Tensor, here: slice) -> torch.Tensor:
            """float32 [2, all positions]: log p of the text's next token, divergence of what could
            be.
            """
            log_q = torch.log_softmax(logits, dim=-1)
            chosen = log_q.gather(1, targets[here, None])[:, 0]
            which = begins[here]
            at = (which >= 0).nonzero()[:, 0]
            P = self._next(said, which[at], log_q.shape[-1])
            further = distribution_divergence(P, log_q[at])
            found = torch.stack([chosen, torch.zeros_like(chosen).index_copy(0, at, further)])
            left = found.new_zeros(2, here.start)
            right = found.new_zeros(2, len(targets) - here.stop)
            return torch.cat([left, found, right], dim=1)

        both = chunked_logits(model, hidden.reshape(len(targets), -1), each)
        log_p = both[0].view(len(batch.ids), width)
        count = learnt.sum()
        terms = {
            "ce": -(log_p * learnt).sum() / count,
            "next": both[1].sum() / count,
        }
        own = spans.total(torch.nn.functional.pad(log_p, (1, 0)), 2)
        terms["binary"] = binary_divergence(said.log_p, own, self.tau).sum() / count
        aligned = terms["next"] + self.binary * terms["binary"]
        terms["loss"] = (self.ce * terms["ce"] + self.spans * aligned) / (self.ce + self.spans)
        return terms | {"count": count}

    @torch.no_grad()
    def _next(self, said: _Said, which: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """The teacher's next token where some spans begin, [n, vocabulary]."""
        if said.carried is not None:
            return said.carried[which]
        with torch.autocast(which.device.type, enabled=False):
            logits = head_logits(self.teacher, said.hidden[which]).float()
        return carried(logits, self._carry(logits), vocabulary)

    def _carry(self, logits: torch.Tensor) -> torch.Tensor:
        """pairs.first on the device, no longer than the logits."""
        if self._first is None or self._first.device != logits.device:
            self._first = self.pairs.first.to(logits.device)
        return self._first[: logits.shape[1]]

    def _teacher(self, batch: Batch, spans: _Spans, vocabulary: int) -> _Said:
        """About a batch. Where everything the teacher will ever say of the rows is small it says it
        once: of each row alone, so that it does not depend on the batch the row came in first.
        """
        expected = 4 * vocabulary * sum(map(len, self.pairs.spans))
        if expected > _KEPT_BYTES:
            return self._say(spans, None)
        rows = batch.rows.tolist()
        for row in rows:
            if row not in self._kept:
                self._kept[row] = self._say(_Spans(self.pairs, [row], batch.ids.device), vocabulary)
        found = [self._kept[row] for row in rows]
        return _Said(
            None,
            torch.cat([said.carried for said in found]),
            torch.cat([said.log_p for said in found]),
        )

    @torch.no_grad()
    def _say(self, spans: _Spans, vocabulary: int | None) -> _Said:
        """About some rows; what comes next as hidden states, or (vocabulary: the student's)
        carried.
        """
        with torch.autocast(spans.ids.device.type, enabled=False):
            hidden = final_hidden(self.teacher, spans.ids)
            width = hidden.shape[1] - 1
            targets = spans.ids[:, 1:].reshape(-1)
            before = spans.row * width + spans.table[:, 0] - 1
            seen = hidden[:, :-1].reshape(len(targets), -1)
            kept = (
                None
                if vocabulary is None
                else seen.new_zeros(len(before), vocabulary, dtype=torch.float32)
            )

            def each(logits: torch.Tensor, here: slice) -> torch.Tensor:
                if kept is not None:
                    at = ((before >= here.start) & (before < here.stop)).nonzero()[:, 0]
                    some = logits[before[at] - here.start]
                    kept[at] = carried(some, self._carry(logits), vocabulary)
                found = torch.log_softmax(logits, dim=-1).gather(1, targets[here, None])[:, 0]
                return torch.nn.functional.pad(found, (here.start, len(targets) - here.stop))

            log_p = chunked_logits(self.teacher, seen, each).view(len(spans.ids), width)
        total = spans.total(torch.nn.functional.pad(log_p, (1, 0)), 0)
        return _Said(seen[before] if kept is None else None, kept, total)


class _Said(NamedTuple):
    """A teacher on some rows: hidden states [spans, width] where the spans begin, or what it
    expects there, carried to the student's tokens, [spans, vocabulary]; and log p [spans].
    """

    hidden: torch.Tensor | None
    carried: torch.Tensor | None
    log_p: torch.Tensor


class _Spans:
    """The spans of a batch: their rows within it, int64 [n], and tables int64 [n, 4]; the teacher's
    ids [rows, L], padded on the right.
    """

    def __init__(self, pairs: Pairs, rows: list[int], device: torch.device):
        found = [pairs.spans[row] for row in rows]
        self.table = torch.cat(found).to(device)
        lengths = torch.tensor([len(part) for part in found])
        self.row = torch.repeat_interleave(torch.arange(len(rows)), lengths).to(device)
        self.ids = torch.nn.utils.rnn.pad_sequence(
            [pairs.teacher[row] for row in rows], batch_first=True
        ).to(device)

    def total(self, log_p: torch.Tensor, side: int) -> torch.Tensor:
        """Sums [n] over each span's tokens of log_p [rows, L]; side 0 the teacher's columns of the
        table, 2 the student's. In a fixed order, gathered: no atomics.
        """
        start, stop = self.table[:, side], self.table[:, side + 1]
        longest = int((stop - start).max()) if len(start) else 1
        at = start[:, None] + torch.arange(longest, device=start.device)
        inside = at < stop[:, None]
        index = (self.row[:, None] * log_p.shape[1] + at).where(inside, 0)
        return (log_p.reshape(-1)[index] * inside).sum(dim=1)
