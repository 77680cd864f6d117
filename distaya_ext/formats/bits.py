"""Dense bit packing: element i of a row is bits [i * bits, (i + 1) * bits) of the row's stream.

The stream is little-endian in int32 words, so 32 elements take exactly `bits` words and nothing is
lost between them. Rows begin on a word. This is what compressed-tensors calls pack-quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 22  # elements widened to int64 at once


def words(count: int, bits: int) -> int:
    """int32 words that `count` elements of `bits` bits take."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, count] with every value < 2^bits -> int32 [rows, words(count, bits)].

    bits 1 to 8; what is left of the last word is 0. The caller vouches for the range.
    """
    rows, count = values.shape
    out = values.new_zeros(rows, 4 * words(count, bits))
    if bits == 8:
        out[:, :count] = values
    elif bits == 4:
        out[:, : (count + 1) // 2] = values[:, ::2]
        out[:, : count // 2] |= values[:, 1::2] << 4
    else:
        for part in _row_blocks(rows, count):
            out[part] = _pack_bytes(values[part], bits)[:, : out.shape[1]]
    return out.view(torch.int32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words(count, bits)] -> uint8 [rows, count]; the exact inverse of pack."""
    stream = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[:, :count].contiguous()
    out = stream.new_empty(len(stream), count)
    if bits == 4:
        out[:, ::2] = stream[:, : (count + 1) // 2] & 15
        out[:, 1::2] = stream[:, : count // 2] >> 4
        return out
    for part in _row_blocks(len(stream), count):
        out[part] = _unpack_bytes(stream[part], bits, count)
    return out


def _row_blocks(rows: int, count: int) -> list[slice]:
    step = max(1, _BLOCK // max(1, count))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _pack_bytes(values: Tensor, bits: int) -> Tensor:
    """Eight elements are `bits` bytes: shift them into an int64 and keep its low bytes."""
    rows, count = values.shape
    eights = -(-count // 8)
    wide = torch.nn.functional.pad(values, (0, 8 * eights - count)).long().view(rows, eights, 8)
    joined = (wide << (bits * torch.arange(8, device=values.device))).sum(
        dim=2
    )  # the parts do not overlap
    low = joined.unsqueeze(2).view(torch.uint8)[:, :, :bits].reshape(rows, eights * bits)
    return torch.nn.functional.pad(low, (0, 3))  # a last word may reach past the last eight


def _unpack_bytes(stream: Tensor, bits: int, count: int) -> Tensor:
    rows, eights = len(stream), -(-count // 8)
    short = max(0, eights * bits - stream.shape[1])
    stream = torch.nn.functional.pad(stream, (0, short))[:, : eights * bits]
    wide = stream.new_zeros(rows, eights, 8)
    wide[:, :, :bits] = stream.reshape(rows, eights, bits)
    joined = wide.view(torch.int64)  # [rows, eights, 1]
    values = (joined >> (bits * torch.arange(8, device=stream.device))) & ((1 << bits) - 1)
    return values.view(rows, 8 * eights)[:, :count].to(torch.uint8)
