"""The whole dense model in memory, run from any of its layers with some matrices exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import Checkpoint
from ..checkpoint.whole import load_whole
from ..compress.capture import Calls, Ends
from ..compress.packing import Packing
from ..compress.store import Store
from ..models.skeleton import feed_whole

_LOGIT_BYTES = 64 << 20  # float32 logits worked on at once
_LOGIT_TOKENS = 1024  # at most: masks, which nobody reads there, are made for the square of them
CHUNK_BYTES = 256 << 20  # log-probabilities of the windows that are run at once
KEPT_BYTES = 1 << 30  # references of whole window sets kept in memory
_FLOAT32_BELOW = 2 << 30  # smaller checkpoints run in float32, which takes rounding out of the KL


def run_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the model is run in."""
    return torch.float32 if checkpoint.nbytes < _FLOAT32_BELOW else checkpoint.dtype


class Whole(Ends):
    """The model and its layers, alive. No weight is changed but inside exchanged()."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.dtype = run_dtype(checkpoint)
        model = load_whole(checkpoint.folder, self.dtype).to(device).requires_grad_(False)
        feed_whole(model.get_output_embeddings())
        super().__init__(model, checkpoint, device)
        self.device = device
        self._dense_ends: dict[str, torch.Tensor] = {}
        self.prefix = checkpoint.architecture.layers
        self.vocabulary = checkpoint.config.vocab_size

    def _load(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Nothing: the model is complete."""

    def round_ends(self, packing: Packing) -> None:
        """Give embedding and head the 8 bits they will be written with; references stay dense."""
        for name in packing.ends:
            module = self.model.get_submodule(name)
            self._dense_ends[name] = module.weight.data
            grid = packing.embedding(name, self.device)
            module.weight.data = grid.dense(self.dtype).to(self.device)

    def dense_ends(self) -> AbstractContextManager:
        """Inside, embedding and head are the dense ones."""
        return self.exchanged(self._dense_ends)

    @property
    def rounded(self) -> bool:
        """Whether round_ends changed anything."""
        return bool(self._dense_ends)

    @contextmanager
    def exchanged(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Other weights in Linears (by full name) for a while."""
        before = {name: self.model.get_submodule(name).weight.data for name in weights}
        try:
            for name, weight in weights.items():
                self.model.get_submodule(name).weight.data = weight
            yield
        finally:
            for name, weight in before.items():
                self.model.get_submodule(name).weight.data = weight

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Log-softmax, float32 [tokens, vocabulary], of the next token after the last layer's
        outputs hidden [tokens, width], some tokens at a time.

        Norm, head and scale look at one token at a time, so tokens of many windows stand in a row.
        """
        step = max(1, min(_LOGIT_TOKENS, _LOGIT_BYTES // (4 * self.vocabulary)))
        for start in range(0, len(hidden), step):
            part = hidden[start : start + step][None]
            ids = torch.zeros(1, part.shape[1], dtype=torch.int64, device=part.device)
            logits = self.logits(ids, part, part.shape[1])[0].float()
            yield slice(start, start + len(logits)), logits.log_softmax(dim=-1)


class Windows:
    """Token windows with what every layer is called with, their first hidden states and the dense
    model's last ones.
    """

    def __init__(self, whole: Whole, ids: torch.Tensor, languages: list[str], folder: Path | None):
        self.whole, self.ids = whole, ids
        self.languages = sorted(set(languages))
        place = {lang: i for i, lang in enumerate(self.languages)}
        self.of_window = np.array([place[lang] for lang in languages])
        self.count, self.length = ids.shape
        self.chunk = max(1, CHUNK_BYTES // (4 * whole.vocabulary * self.length))
        self.calls = Calls()
        self.store = Store(folder)  # ("first" | "last" | "here", chunk)
        self._references: dict[int, Reference] = {}
        for part in ids.split(self.chunk):
            _, calls = whole.inputs(part.to(whole.device))
            self.calls.add(calls)
        self.begin()
        for chunk in range(self.chunks):
            self.store.put(("last", chunk), self.run(self.store.get(("first", chunk)), chunk, 0))

    def begin(self) -> None:
        """Note the first hidden states, as the embedding gives them now."""
        for index, part in enumerate(self.ids.split(self.chunk)):
            hidden, _ = self.whole.inputs(part.to(self.whole.device))
            self.store.put(("first", index), hidden)

    @property
    def chunks(self) -> int:
        return len(self.calls)

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @torch.no_grad()
    def run(
        self, hidden: torch.Tensor, chunk: int, start: int, stop: int | None = None
    ) -> torch.Tensor:
        """Hidden states of a chunk [windows, length, width] sent through layers start to stop."""
        for layer in range(start, len(self.whole.layers) if stop is None else stop):
            hidden = self.calls.of(layer, chunk).run(self.whole.layers[layer], hidden)
        return hidden

    def reference(self, chunk: int) -> Reference:
        """The dense model's distributions over a chunk, kept if there is room for all chunks."""
        if chunk in self._references:
            return self._references[chunk]
        found = Reference(self.whole, self.store.get(("last", chunk)))
        if 8 * self.tokens * self.whole.vocabulary <= KEPT_BYTES:
            self._references[chunk] = found
        return found

    def forget(self) -> None:
        """Give up the references that were kept."""
        self._references.clear()


class Reference:
    """The dense model's distributions after last hidden states [windows, length, width]."""

    def __init__(self, whole: Whole, last: torch.Tensor):
        self.whole = whole
        flat = last.reshape(-1, last.shape[-1])
        with whole.dense_ends():
            self._log = [log for _, log in whole.log_probabilities(flat)]
        self._share = [log.exp() for log in self._log]

    @torch.no_grad()
    def divergence(self, hidden: torch.Tensor) -> np.ndarray:
        """Mean KL(dense || this) per window, float64, of last hidden states."""
        windows, length, width = hidden.shape
        found = torch.empty(windows * length, dtype=torch.float64, device=hidden.device)
        flat = hidden.reshape(-1, width)
        parts = self.whole.log_probabilities(flat)
        for (place, log), base, share in zip(parts, self._log, self._share, strict=True):
            found[place] = log.sub_(base).mul_(share).sum(dim=-1).neg_().clamp_min_(0.0).double()
        return found.view(windows, length).mean(dim=1).cpu().numpy()
