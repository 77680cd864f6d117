"""One walk through the dense model, a decoder layer in memory at a time, that tells what every
layer does and what the model would be without it.

The hidden states of the model go from layer to layer, and beside them, for every layer that has
been met, those of the model without it: the candidate's stream begins as the layer's input and goes
through all later layers. So each layer's weights are read once and n layers take n (n + 1) / 2
forwards in all.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..compress.budget import Budget, check_disk
from ..compress.calibrate import CUDA_CHUNK_TOKENS, Calibration
from ..compress.capture import Calls, Ends, load_layer
from ..compress.store import Store
from ..errors import InputError
from ..finite import all_finite
from ..models.skeleton import build_skeleton, feed_whole
from ..ops import influence
from ..search.whole import run_dtype
from .candidate import PARTS, Candidate, silent
from .dealt import Dealt
from .events import Measured
from .head import Head


@dataclass
class Sweep:
    """What one walk measured, as sums in float64 over a window's tokens; nothing is divided yet.

    near[candidate]  [windows, 3] of similarity(the layer's output without the candidate, with it);
                     last the same of the last token alone
    runs[first]      [windows, 3] and, of the last token, [windows, 3]: similarity of what enters
                     layer `first` and what the run of layers that begins there gives
    lost[candidate]  [windows, 4], see Head.compare; base: of the model of the walk itself
    """

    near: dict[Candidate, np.ndarray] = field(default_factory=dict)
    last: dict[Candidate, np.ndarray] = field(default_factory=dict)
    runs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    lost: dict[Candidate, np.ndarray] = field(default_factory=dict)
    base: np.ndarray | None = None


class Walk:
    """Walks of one model over the same windows. Use as a context manager: what spills goes with it.

    streams  how many models' hidden states wait at once at most; with it is decided where they
             wait: on the device, in the host's memory, or in files under `scratch` (None: a
             temporary folder)
    max_ram  bytes to stay within; None: they may fill a quarter of the memory

    Under ranks each walks its own windows (dealt.Dealt) and all of them read every layer together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Calibration,
        *,
        streams: int,
        device: torch.device,
        scratch: Path | None = None,
        max_ram: int | None = None,
        on_event: Callable[[Any], None] | None = None,
    ):
        self.checkpoint = copy.copy(checkpoint)
        self.checkpoint.dtype = run_dtype(checkpoint)  # weights are read in it
        self.device = device
        self.layers = tuple(range(checkpoint.config.num_hidden_layers))
        if device.type == "cuda":
            most = max(windows.chunk_tokens or 0, CUDA_CHUNK_TOKENS)
            windows = dataclasses.replace(windows, chunk_tokens=most)
        self.dealt = Dealt(windows)
        self.ids = self.dealt.own
        self.on_event = self.dealt.only_first(on_event or (lambda event: None))
        self._folder: tempfile.TemporaryDirectory | None = None
        self._streams, self._scratch = streams, scratch
        self._budget = Budget(checkpoint, max_ram)
        self._done = self._total = 0

    def __enter__(self) -> Walk:
        ends = self._ends()
        self._weightless, self._calls = ends.layers, Calls()
        self.store = self._store()
        try:
            for chunk, ids in enumerate(self.ids):
                hidden, calls = ends.inputs(ids.to(self.device))
                self.store.put(("first", chunk), hidden)
                self._calls.add(calls)
        except BaseException:
            self.__exit__()  # nobody else will
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.store.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _ends(self) -> Ends:
        """Embedding, norm and head, read anew: they are not held while layers are."""
        skeleton = build_skeleton(self.checkpoint.config, self.checkpoint.dtype)
        feed_whole(skeleton.get_output_embeddings())
        shared = not self.dealt.team.alone
        return Ends(skeleton, self.checkpoint, self.device, shared=shared)

    def _store(self) -> Store:
        """Where the streams wait, and the first and the last states of the dense model."""
        width = self.checkpoint.config.hidden_size * self.checkpoint.dtype.itemsize
        needed = (self._streams + 3) * sum(map(torch.numel, self.ids)) * width
        if self._budget.spills(needed):
            check_disk(
                self._scratch or Path(tempfile.gettempdir()), needed * self.dealt.team.local_world
            )
            self._folder = tempfile.TemporaryDirectory(dir=self._scratch, prefix="distaya-layers-")
            return Store(Path(self._folder.name))
        away = self.device.type == "cuda" and needed > torch.cuda.mem_get_info(self.device)[0] // 2
        return Store(host=away)

    def sweep(
        self,
        left: Sequence[int] | None = None,
        *,
        removal: bool = True,
        parts: bool = False,
        run: int = 1,
        what: str = "",
    ) -> Sweep:
        """Walk through the layers `left` (None: all), which are a model of their own.

        removal: also what the model would be without each of them. parts: also their attention and
        their MLP by themselves. run: how many consecutive layers a run has. The first sweep must
        be of all layers: what it gives is what everything is compared with. One of all layers
        without removal compares nothing.
        """
        left = self.layers if left is None else tuple(left)
        self._begin(len(left), removal, parts, what)
        state = _State(self, left, run, parts, removal)
        for place, layer in enumerate(left):
            told = f"{what}layer {place + 1} of {len(left)}"
            module = self._load(layer)
            for chunk in range(len(self.ids)):
                state.step(chunk, place, layer, module, told)
            del module  # before the next one is read
            state.walked(layer)
        if left == self.layers:
            for chunk in range(len(self.ids)):
                self.store.put(("dense", chunk), self.store.get(("here", chunk)))
        if removal or left != self.layers:
            state.judge(Head(self._ends()), f"{what}head")
        state.forget()
        return state.found

    def _load(self, layer: int) -> nn.Module:
        prefix = f"{self.checkpoint.architecture.layers}.{layer}"
        empty, shared = self._weightless[layer], not self.dealt.team.alone
        return load_layer(empty, prefix, self.checkpoint, self.device, shared=shared)

    def forward(self, layer: int, module: nn.Module, chunk: int, x: torch.Tensor) -> torch.Tensor:
        """A chunk through a layer, as the model's own forward calls it."""
        return self._calls.of(layer, chunk).run(module, x)

    def _begin(self, count: int, removal: bool, parts: bool, what: str) -> None:
        each = 1 + 2 * parts
        variants = count * each if removal else 0
        later = variants * (count - 1) // 2
        self._done = 0
        self._total = len(self.ids) * (count * each + later + 1 + variants)
        self.tell(f"{what}layer 1 of {count}", 0)

    def tell(self, what: str, steps: int = 1) -> None:
        """So many forwards more are done."""
        self._done += steps
        self.on_event(Measured(self._done, self._total, what))


class _State:
    """A sweep on its way."""

    def __init__(self, walk: Walk, left: tuple[int, ...], run: int, parts: bool, removal: bool):
        self.walk, self.store, self.left, self.run = walk, walk.store, left, run
        self.parts, self.removal = parts, removal
        self.met: list[Candidate] = []  # those with a stream
        self.found = Sweep()
        self._near: dict[tuple, list[tuple[np.ndarray, np.ndarray]]] = {}

    @torch.no_grad()
    def step(self, chunk: int, place: int, layer: int, module: nn.Module, told: str) -> None:
        """One chunk of all streams through one layer."""
        walk, store = self.walk, self.store
        x = store.get((("first" if place == 0 else "here"), chunk))
        y = walk.forward(layer, module, chunk, x)
        if not all_finite(y):
            raise InputError(
                f"the output of layer {layer} is not finite for the texts; the model overflows in "
                f"{str(walk.checkpoint.dtype).removeprefix('torch.')}"
            )
        walk.tell(told)
        for candidate in self.met:
            if self.removal:
                gone = walk.forward(layer, module, chunk, store.get((candidate, chunk)))
                store.put((candidate, chunk), gone)
                walk.tell(told)
        self._without(Candidate("layer", layer), chunk, x, y)
        for kind in PARTS if self.parts else ():
            with silent(module, PARTS[kind]):
                rest = walk.forward(layer, module, chunk, x)
            self._without(Candidate(kind, layer), chunk, rest, y)
            walk.tell(told)
        store.put(("here", chunk), y)
        self._runs(chunk, place, x, y)

    def _without(self, who: Candidate, chunk: int, rest: torch.Tensor, y: torch.Tensor) -> None:
        """A candidate of this layer: what comes out without it, and with it."""
        self._near.setdefault(("near", who), []).append(nearness(rest, y))
        if self.removal:
            self.store.put((who, chunk), rest)

    def _runs(self, chunk: int, place: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Inputs of layers wait until the run that begins there is complete."""
        if self.run < 2:
            return
        self.store.put(("run", place, chunk), x)
        first = place + 1 - self.run
        if first >= 0:
            begin = self.store.get(("run", first, chunk))
            self._near.setdefault(("run", self.left[first]), []).append(nearness(begin, y))
            self.store.drop(("run", first, chunk))

    def walked(self, layer: int) -> None:
        """All chunks are through a layer."""
        self.met.append(Candidate("layer", layer))
        if self.parts:
            self.met += [Candidate(kind, layer) for kind in PARTS]

    def judge(self, head: Head, told: str) -> None:
        """The end of the walk: every stream is compared with the dense model's."""
        walk, store, lost = self.walk, self.store, []
        compared = self.met if self.removal else []
        for chunk, ids in enumerate(walk.ids):
            ids, dense = ids.to(walk.device), store.get(("dense", chunk))
            if chunk == 0 and walk.dealt.begins:
                head.check(ids, dense)
            streams = [store.get((key, chunk)) for key in ("here", *compared)]
            lost.append(head.compare(dense, streams, ids))
            walk.tell(told, 1 + len(compared))
        sums = np.concatenate([np.zeros((1 + len(compared), 0, 4)), *lost], axis=1)
        base, *others = walk.dealt.gather(list(sums))
        self.found.base = base
        self.found.lost = dict(zip(compared, others, strict=True))

    def forget(self) -> None:
        """Put the similarities of all chunks, of all ranks, together; let the streams go."""
        begins = self.left[: len(self.left) - self.run + 1] if self.run > 1 else ()
        keys = [*(("near", who) for who in self.met), *(("run", first) for first in begins)]
        none = (np.zeros((0, 3)), np.zeros((0, 3)))  # all that a rank without windows has
        tables = [
            np.concatenate(part)
            for key in keys
            for part in zip(none, *self._near.get(key, ()), strict=True)
        ]
        gathered = iter(self.walk.dealt.gather(tables))
        for (kind, who), every, last in zip(keys, gathered, gathered, strict=True):
            if kind == "near":
                self.found.near[who], self.found.last[who] = every, last
            else:
                self.found.runs[who] = (every, last)
        waiting = [("run", place) for place in range(len(self.left))]
        for chunk in range(len(self.walk.ids)):
            for key in [("here",), *((who,) for who in self.met), *waiting]:
                self.store.drop((*key, chunk))


def nearness(x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """ops.influence.similarity of x, y [windows, length, hidden]: float64 [windows, 3] sums over a
    window's tokens, and of its last token alone.
    """
    every = influence.similarity(x, y).double().cpu().numpy().reshape(*x.shape[:2], 3)
    return every.sum(axis=1), every[:, -1]
