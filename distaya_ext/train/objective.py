"""What the training loop and a loss know of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass
class Batch:
    """Rows of a training batch, on the model's device.

    ids, labels  int64 [rows, length]; label t is the token at t itself (not yet shifted), -100
                 where nothing is to be learnt (prompts of chats, padding)
    mask         bool [rows, length]; False is padding, on the right
    rows         int64 [rows]: which rows of the training data these are (held-out rows count on
                 from the training ones)
    """

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor


class Objective(Protocol):
    """A loss. modules (None: there are none) are trained and kept beside the model, as projectors
    of hidden states are.
    """

    modules: nn.Module | None

    def __call__(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Terms by name, 0-d tensors, "loss" among them: what is minimised, a mean over the
        batch's labels. Others are only logged. With them "count": labels it is a mean over.
        """
        ...
