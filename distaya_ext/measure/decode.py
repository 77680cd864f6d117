"""Decoding as it is served: a cache of fixed size, and one step captured as a CUDA graph.

A packed model's step is some hundred short kernels, which Python alone takes longer to queue than
the GPU to run; replayed as one graph they cost one call. A step reads no value on the host, and all
that it reads and writes stays where it is, so that it can be captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WARM = 3  # steps before a capture, so that libraries have their work spaces


class StaticDecode:
    """Greedy decoding of one sequence after a prompt ids [1, L], at most `new` tokens.

    token [1, 1] is the last one, logits [1, 1, vocabulary] those it was chosen by.
    """

    def __init__(self, model: Any, ids: Tensor, new: int) -> None:
        from transformers import StaticCache

        self.model, self.prompt = model, ids.shape[1]
        self.cache = StaticCache(model.config, max_cache_len=self.prompt + max(new, _WARM))
        self.position = torch.arange(self.prompt, device=ids.device).view(1, -1)
        self.logits = self._forward(ids).clone()
        self.position = self.position[:, -1:] + 1
        self.token = self.logits.argmax(-1)
        self._first = self.token.clone()
        self.graph: Any = None

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def step(self) -> None:
        """One token; nothing is read on the host, nothing moves to another place."""
        self.logits.copy_(self._forward(self.token))
        self.token.copy_(self.logits.argmax(-1))
        self.position.add_(1)

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.prompt
        self.position.fill_(self.prompt)
        self.token.copy_(self._first)

    def capture(self) -> None:
        """Make a graph of one step (CUDA only); run() replays it."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self.step()
        here.wait_stream(aside)
        self.rewind()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        self.rewind()

    def run(self, count: int) -> Tensor:
        """So many tokens from the end of the prompt; the last of them."""
        self.rewind()
        for _ in range(count):
            if self.graph is not None:
                self.graph.replay()
            else:
                self.step()
        return self.token


def fits(model: Any, length: int) -> bool:
    """Whether one step serves so many positions: a sliding window that fills up changes it."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else True
    return window is None or not slides or length <= window
