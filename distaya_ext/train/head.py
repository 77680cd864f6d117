"""The head of a language model on a few tokens at a time: [tokens, 256k] logits never exist."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_LOGIT_BYTES = 32 << 20  # of float32 logits alive at once


def body(model: Any) -> nn.Module:
    """What stands below the head: embedding, decoder layers and the last norm."""
    return getattr(model, model.base_model_prefix)


def final_hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [rows, length, hidden] that the head is given, behind the last norm.

    ids int64 [rows, length], padded on the right, where a causal model does not look from the
    tokens that count; so there is no mask, and what is at padding means nothing.
    """
    return body(model)(input_ids=ids, use_cache=False).last_hidden_state


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] of hidden states [..., hidden] behind the last norm.

    It is the family's own forward that runs, with a body that returns `hidden`: scales and soft
    caps are thus those of transformers. The model itself is not touched.
    """
    shell = copy.copy(model)
    shell._modules = dict(model._modules)
    shell._modules[model.base_model_prefix] = _Given(hidden.reshape(1, -1, hidden.shape[-1]))
    found = type(model).forward(shell, input_ids=None, use_cache=False).logits
    return found.view(*hidden.shape[:-1], found.shape[-1])


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose float32 logits take 32 MiB; at least one."""
    return max(1, _LOGIT_BYTES // (4 * vocabulary))


def chunked_logits(
    model: Any,
    hidden: torch.Tensor,
    fn: Callable[[torch.Tensor, slice], torch.Tensor],
    chunk: int | None = None,
) -> torch.Tensor:
    """sum over chunks of fn(logits [t, vocabulary] float32, which tokens), in their order.

    hidden [tokens, hidden] behind the last norm; fn returns a tensor of one shape for every chunk,
    a 0-d sum or several of them. Where a gradient is wanted a chunk's logits are thrown away and
    made again in the backward pass, so fn must be a pure function. chunk None: tokens whose logits
    take 32 MiB. Without any token fn sees one empty chunk.
    """
    step = chunk or chunk_tokens(model.config.get_text_config().vocab_size)

    def part(rows: torch.Tensor, here: slice) -> torch.Tensor:
        return fn(head_logits(model, rows).float(), here)

    total: torch.Tensor | None = None
    for start in range(0, max(1, len(hidden)), step):
        here = slice(start, min(start + step, len(hidden)))
        if torch.is_grad_enabled():
            found = checkpoint(
                part, hidden[here], here, use_reentrant=False, preserve_rng_state=False
            )
        else:
            found = part(hidden[here], here)
        total = found if total is None else total + found
    assert total is not None
    return total


class _Given(nn.Module):
    """Stands for the body and returns the hidden states it was made with."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden)
