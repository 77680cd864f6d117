"""The whole dense model in memory, run from any of its layers with some matrices exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..checkpoint.whole import load_whole
from ..compress.capture import Calls, Ends
from ..compress.packing import Packing
from ..compress.store import Store
from ..models.skeleton import build_skeleton, feed_whole, is_tied
from ..ranks import read_shared, team
from .deal import Dealt

_LOGIT_BYTES = 64 << 20  # float32 logits worked on at once
_LOGIT_TOKENS = 1024  # at most: masks, which nobody reads there, are made for the square of them
CHUNK_BYTES = 256 << 20  # log-probabilities of the windows that are run at once
KEPT_BYTES = 1 << 30  # references of whole window sets kept in memory
_FLOAT32_BELOW = 2 << 30  # smaller checkpoints run in float32, which takes rounding out of the KL


def run_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the model is run in."""
    return torch.float32 if checkpoint.nbytes < _FLOAT32_BELOW else checkpoint.dtype


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The model on the CPU. Ranks read it together, every byte once."""
    if team().alone:
        return load_whole(checkpoint.folder, dtype)
    model = build_skeleton(checkpoint.config, dtype)
    tied = is_tied(model, checkpoint.architecture)
    parts: dict[str, list[str]] = {}  # by layer, so that little waits in the dtype of the files
    for name in model.state_dict():
        if not tied or name != f"{checkpoint.architecture.head}.weight":
            parts.setdefault(".".join(name.split(".")[:3]), []).append(name)
    for names in parts.values():
        tensors = read_shared(checkpoint, names)
        state = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        model.load_state_dict(state, strict=False, assign=True)
    if tied:
        embed = model.get_submodule(checkpoint.architecture.embed)
        model.get_submodule(checkpoint.architecture.head).weight = embed.weight
    return model


class Whole(Ends):
    """The model and its layers, alive. No weight is changed but inside exchanged()."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.dtype = run_dtype(checkpoint)
        model = load(checkpoint, self.dtype).to(device).requires_grad_(False)
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
    model's last ones. Every rank has all of them.
    """

    def __init__(self, whole: Whole, ids: torch.Tensor, languages: list[str], folder: Path | None):
        self.whole, self.ids = whole, ids
        self.languages = sorted(set(languages))
        place = {lang: i for i, lang in enumerate(self.languages)}
        self.of_window = np.array([place[lang] for lang in languages])
        self.count, self.length = ids.shape
        self.chunk = max(1, CHUNK_BYTES // (4 * whole.vocabulary * self.length))
        self.dealt = self.deal(1)
        self.calls = Calls()
        self.store = Store(folder)  # ("first" | "last" | "here" | "run", chunk)
        self._references: dict[int, Reference] = {}
        for part in ids.split(self.chunk):
            _, calls = whole.inputs(part.to(whole.device))
            self.calls.add(calls)
        self.begin()
        self.send("first", "last", 0, len(whole.layers))

    def deal(self, variants: int) -> Dealt:
        """So many models measured on these windows, among the ranks."""
        return Dealt(variants, self.count, self.chunk, team().world)

    @property
    def own(self) -> list[int]:
        """The chunks that this rank runs when one model is measured."""
        return [i for i in range(self.chunks) if self.dealt.rank_of(0, i) == team().rank]

    def send(self, source: str, to: str, start: int, stop: int) -> None:
        """All windows through the dense layers start to stop, from one key to another; each rank
        runs its own and has the others' from those that do.
        """
        us, own = team(), self.own
        for chunk in own:
            hidden = self.run(self.store.get((source, chunk)), chunk, start, stop)
            self.store.put((to, chunk), hidden if us.alone else hidden.contiguous())
        for chunk in range(0 if us.alone else self.chunks):
            key = (to, chunk) if chunk in own else (source, chunk)
            hidden = self.store.get(key)
            if chunk not in own:
                hidden = torch.empty_like(hidden)
            us.broadcast_(hidden, self.dealt.rank_of(0, chunk))
            if chunk not in own:
                self.store.put((to, chunk), hidden)

    def begin(self) -> None:
        """Note the first hidden states, as the embedding gives them now."""
        for index, part in enumerate(self.ids.split(self.chunk)):
            hidden, _ = self.whole.inputs(part.to(self.whole.device))
            self.store.put(("first", index), hidden)

    @property
    def chunks(self) -> int:
        return len(self.calls)

    def place(self, chunk: int) -> slice:
        """The windows of a chunk."""
        return slice(chunk * self.chunk, (chunk + 1) * self.chunk)

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


def measure(
    windows: Windows,
    weights: dict[int, Callable[[], dict[str, torch.Tensor]]],
    skip: frozenset[int],
) -> np.ndarray:
    """Mean KL(dense || model) per window, the model being the dense one without the layers in skip
    and with what weights[layer]() gives (by full name) in the place of its Linears.

    One layer's weights are in memory at a time beside the dense model's. Ranks have windows of
    their own, and all of them call weights[layer]() at the same time.
    """
    whole, store, own = windows.whole, windows.store, windows.own
    for chunk in own:
        store.put(("run", chunk), store.get(("first", chunk)))
    for layer in range(len(whole.layers)):
        if layer in skip:
            continue
        with whole.exchanged(weights[layer]() if layer in weights else {}):
            for chunk in own:
                hidden = windows.run(store.get(("run", chunk)), chunk, layer, layer + 1)
                store.put(("run", chunk), hidden)
    found = np.zeros((1, windows.count))
    for chunk in own:
        found[0, windows.place(chunk)] = windows.reference(chunk).divergence(
            store.get(("run", chunk))
        )
        store.drop(("run", chunk))
    return windows.dealt.gathered(found)[0]


def by_language(windows: Windows, per_window: np.ndarray) -> np.ndarray:
    """Means per language, float64 [languages]."""
    sums = np.bincount(windows.of_window, weights=per_window, minlength=len(windows.languages))
    return sums / np.bincount(windows.of_window, minlength=len(windows.languages))
