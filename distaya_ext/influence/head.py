"""From the last layer's outputs to distributions, and how far those lie apart."""

from __future__ import annotations

import numpy as np
import torch

from ..compress.capture import Ends
from ..errors import InputError
from ..ops import influence

_STACK_BYTES = 64 << 20  # hidden states of all variants compared at once
_CHECKED = 4  # positions whose logits are compared with the model's own,
_ENTRIES = 4096  # and so many of the vocabulary
_ULPS = 4  # rounding steps of the run's dtype allowed there, at the largest logit


class Head:
    """Final norm, output matrix and what the family does to logits: cap * tanh(z / cap) of
    z = scale * (h W^T + bias).
    """

    def __init__(self, ends: Ends):
        config, head = ends.model.config, ends.model.get_submodule(ends.architecture.head)
        self.ends = ends
        self.norm = ends.model.get_submodule(ends.architecture.norm)
        self.W, self.bias = head.weight.data, getattr(head, "bias", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)  # the Cohere family's
        self.cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2's

    @torch.no_grad()
    def check(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """InputError when logits by this formula are not those of the model's own forward.

        ids [windows, length] and the outputs [windows, length, hidden] of the last layer for them.
        """
        keep = min(_CHECKED, ids.shape[1])
        own = self.ends.logits(ids[:1], hidden[:1], keep)[0, :, :_ENTRIES].double()
        h, W = self.norm(hidden[:1])[0, -keep:].double(), self.W[:_ENTRIES].double()
        z = h @ W.T
        z = self.scale * (z if self.bias is None else z + self.bias[:_ENTRIES].double())
        z = z if self.cap is None else self.cap * (z / self.cap).tanh()
        diff, most = float((z - own).abs().max()), float(own.abs().max())
        # Beside the rounding of the result: sums of K products in fp32, K eps |h| |w| at most.
        sums = abs(self.scale) * float(h.norm(dim=1).max() * W.norm(dim=1).max())
        allowed = _ULPS * torch.finfo(self.W.dtype).eps * most
        allowed += W.shape[1] * torch.finfo(torch.float32).eps * sums
        if not diff <= allowed:  # also when NaN
            raise InputError(
                f"the model's logits are not those of its final norm and head with scale "
                f"{self.scale:g} and cap {self.cap}: they differ by {diff:.3g} where {allowed:.3g} "
                "is allowed"
            )

    @torch.no_grad()
    def compare(
        self, dense: torch.Tensor, variants: list[torch.Tensor], ids: torch.Tensor
    ) -> np.ndarray:
        """Float64 [variants, windows, 4] sums over the length - 1 predicted tokens of each window:
        KL(dense || variant), the dense model's -log p of the token, the variant's, and 1 where
        both have the same first choice.

        dense and each of variants [windows, length, hidden], outputs of the last layer; ids int64
        [windows, length].
        """
        width = dense.shape[-1]
        each = len(variants) * ids.shape[1] * width * dense.element_size()
        found = []
        for part in torch.arange(len(ids)).split(max(1, _STACK_BYTES // each)):
            P = self.norm(dense[part])[:, :-1].reshape(-1, width)
            Q = torch.stack([self.norm(v[part])[:, :-1].reshape(-1, width) for v in variants])
            tokens = influence.divergence(
                P, Q, self.W, ids[part, 1:].reshape(-1),
                scale=self.scale, cap=self.cap, bias=self.bias,
            )  # fmt: skip
            by_window = tokens.double().cpu().numpy().reshape(len(variants), len(part), -1, 4)
            found.append(by_window.sum(axis=2))  # on the host, in one fixed order
        return np.concatenate(found, axis=1)
