"""Modules that keep their weights packed and run on our kernels: Linear, Embedding, tied head.

They stand where transformers put an nn.Linear or nn.Embedding and keep its name. In memory a module
is one uint8 buffer in the layout of the kernels; in a state dict it is the tensors that its folder
stores (weight_packed, weight_scale, ...), so what is saved can be loaded here and, where the format
is a standard one, elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import pack, sqgemm
from . import gradient

if TYPE_CHECKING:
    from ..formats import ModuleScheme

_SCALES = (torch.bfloat16, torch.float16, torch.float32)


class Packed(nn.Module):
    """A weight matrix [rows, cols] packed for the kernels, and how its folder stores it.

    It is empty (packed is None) until take() or load_state_dict gives it weights. trains, which
    runtime.trainable sets, lets gradients pass it; the weights themselves never have one.
    """

    packed: Tensor | None
    trains = False

    def __init__(self, scheme: ModuleScheme, rows: int, cols: int) -> None:
        super().__init__()
        self.scheme = scheme
        self.rows, self.cols = rows, cols
        self.format: pack.Format | None = None
        self.spec: list[int] = []  # the format, as the raw ops take it
        self.stored = torch.bfloat16  # dtype of the scales in a state dict
        self.register_buffer("packed", None, persistent=False)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
        """dtype and shape of what a folder must hold for this module, by suffix of the name."""
        return self.scheme.tensors(self.rows, self.cols, self.stored)

    def take(self, tensors: dict[str, Tensor], name: str, device: Any = "cpu") -> None:
        """Pack the tensors of a folder (by suffix; CPU or CUDA) into one buffer on `device`.

        InputError, with `name` in it, when they are not what the scheme says.
        """
        tensors = {suffix: tensor.detach().cpu() for suffix, tensor in tensors.items()}
        grid = self.scheme.decode(tensors, self.rows, self.cols, name)
        del tensors
        self.stored = grid.scales.dtype
        kind, nm = self.scheme.kind, self.scheme.nm
        if kind is None:
            kind, nm = pack.best_kind(grid.codes, grid.zeros)
        scales = grid.scales.to(_smallest(grid.scales))
        try:
            held = pack.pack(
                grid.codes, scales, grid.zeros, kind=kind, group=self.scheme.group, nm=nm
            )
        except ValueError as error:
            raise InputError(f"{name} cannot be packed as {kind}: {error}") from error
        self.hold(held.to(device))

    def hold(self, held: pack.PackedWeight) -> None:
        """Keep a packed weight. ValueError when it is of another shape."""
        if (held.format.rows, held.format.cols) != (self.rows, self.cols):
            raise ValueError(
                f"a packed weight of {held.format.rows}x{held.format.cols} does not fit a module "
                f"of {self.rows}x{self.cols}"
            )
        self.packed = held.data
        self.format = held.format
        self.spec = held.format.spec()

    def weights(self) -> pack.PackedWeight:
        """The packed weight. RuntimeError while there is none."""
        if self.packed is None or self.format is None:
            raise RuntimeError(f"this {type(self).__name__} was given no weights yet")
        return pack.PackedWeight(self.packed, self.format)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weights as a dense matrix [rows, cols]."""
        return pack.dequantize(self.weights(), dtype)

    @property
    def qweight(self) -> Tensor | None:
        """The buffer, by the name under which PEFT looks for the device of quantised weights."""
        return self.packed

    def portable(self) -> dict[str, Tensor]:
        """The tensors its folder stores, by suffix, on the device of the buffer."""
        from ..formats import Grid

        held = self.weights()
        codes, scales, zeros = (part if part is None else part.cpu() for part in pack.unpack(held))
        scales = scales.to(self.stored)
        tensors = self.scheme.encode(
            Grid(codes, scales, zeros, self.scheme.bits, self.scheme.group)
        )
        return {suffix: tensor.to(held.data.device) for suffix, tensor in tensors.items()}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for suffix, tensor in self.portable().items():
                destination[prefix + suffix] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        suffixes = list(self.tensors())
        mine = {prefix + suffix for suffix in suffixes}
        rest = {key: value for key, value in state_dict.items() if key not in mine}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if absent := [key for key in sorted(mine) if key not in state_dict]:
            missing_keys.extend(absent)
            return
        given = {suffix: state_dict[prefix + suffix] for suffix in suffixes}
        device = "cpu" if self.packed is None else self.packed.device
        try:
            self.take(given, prefix.removesuffix("."), device)
        except ValueError as error:
            error_msgs.append(str(error))

    def extra_repr(self) -> str:
        kind = "empty" if self.format is None else f"{self.format.kind}, group {self.format.group}"
        return f"{self.rows}x{self.cols}, {kind}"


class PackedLinear(Packed):
    """y = x W^T + bias on packed weights: x [..., in_features] bf16, fp16 or fp32, y as x.

    exact chooses full-precision activations on the CPU instead of 8-bit ones (a GPU is always
    exact). An input that needs a gradient is refused in a sentence unless the module trains.
    """

    def __init__(
        self, scheme: ModuleScheme, rows: int, cols: int, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(scheme, rows, cols)
        self.in_features, self.out_features = cols, rows
        self.exact = False
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x, self.bias, self.exact)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}, exact={self.exact}"


class PackedEmbedding(Packed):
    """Rows of a packed matrix: indices [...] give [..., embedding_dim] in the dtype of the model.

    factor multiplies the rows, as Gemma does; it is rounded to the dtype of the model first.
    """

    def __init__(
        self,
        scheme: ModuleScheme,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        factor: float | None = None,
    ) -> None:
        super().__init__(scheme, rows, cols)
        self.num_embeddings, self.embedding_dim = rows, cols
        self.padding_idx = padding_idx
        self.factor = factor
        self._factor = rounded(factor, dtype)
        # Empty; model.to(dtype) converts it with the parameters, so that it tells the dtype.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedEmbedding:
        super()._apply(fn, recurse)
        self._factor = rounded(self.factor, self.like.dtype)
        return self

    def forward(self, indices: Tensor) -> Tensor:
        dtype = self.like.dtype
        rows = pack.pack_gather(self.weights().data, self.spec, indices.long(), dtype)
        return rows if self._factor is None else rows * self._factor


class PackedHead(nn.Module):
    """An output head that multiplies with the embedding's own buffer and stores nothing itself."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.cols, embedding.rows
        self.exact = False
        # In a tuple, because as a submodule it would stand in the state dict a second time.
        self._tied = (embedding,)
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> PackedEmbedding:
        """The embedding whose weights this head uses."""
        return self._tied[0]

    @property
    def qweight(self) -> Tensor | None:
        """As Packed.qweight."""
        return self.embedding.packed

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self._tied[0], x, self.bias, self.exact)

    def extra_repr(self) -> str:
        sizes = f"{self.out_features}x{self.in_features}"
        return f"{sizes}, tied to the embedding, exact={self.exact}"


def rounded(factor: float | None, dtype: torch.dtype) -> float | None:
    """factor as the dtype holds it. A number, because a tensor made in forward would have to be
    copied to a GPU, which waits.
    """
    return None if factor is None else torch.tensor(factor, dtype=dtype, device="cpu").item()


def multiply(held: Packed, x: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    """x W^T + bias by the kernel."""
    if held.packed is None:
        raise RuntimeError(f"this {type(held).__name__} was given no weights yet")
    if held.trains:
        return gradient.product(held, x, bias)
    return sqgemm.sqgemm(
        without_gradient(x).contiguous(), held.packed, held.spec, like(bias, x), exact
    )


def without_gradient(x: Tensor) -> Tensor:
    """x, refused with a sentence where autograd would have to go through a packed module."""
    if not x.requires_grad:
        return x
    if torch.is_grad_enabled():
        raise RuntimeError(
            "packed weights cannot be trained through: the input needs a gradient; run the model "
            "under torch.no_grad(), or say that you want this with distaya_ext.trainable(model)"
        )
    return x.detach()


def like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias in the dtype of x, which autocast may have changed."""
    if bias is None:
        return None
    return bias.detach() if bias.dtype == x.dtype else bias.detach().to(x.dtype)


def _smallest(scales: Tensor) -> torch.dtype:
    """The first of bf16, fp16 and fp32 that holds these scales exactly."""
    wide = scales.float()
    return next(dtype for dtype in _SCALES if torch.equal(wide.to(dtype).float(), wide))
