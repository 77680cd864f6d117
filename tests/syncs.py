"""A recorder of everything that would make the host wait for a GPU, usable on CPU tensors.

On the CPU nothing waits, but the calls are the same: reading a value, asking for something whose
size depends on values, moving a tensor to the host.
"""

import functools
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read values on the host, or whose output's size does.
_OPERATORS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "allclose",
}
# Methods that read values without an operator (on CPU tensors) or bring a tensor to the host.
_METHODS = {"cpu", "tolist", "numpy", "__array__", "item", "__bool__", "__int__", "__float__"}
_METHODS |= {"__index__"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _OPERATORS:
            self.found.append(name)
        if name in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class _Methods:
    """torch.Tensor's methods, replaced for a while; heard in the thread that replaced them."""

    def __init__(self, found: list[str]):
        self.found = found
        self.thread = threading.get_ident()
        self.before: list[tuple[object, str, object]] = []

    def replace(self, owner: object, name: str) -> None:
        original = getattr(owner, name)
        self.before.append((owner, name, vars(owner).get(name)))

        @functools.wraps(original)
        def heard(*args, **kwargs):
            if threading.get_ident() == self.thread and (said := _said(name, args, kwargs)):
                self.found.append(said)
            return original(*args, **kwargs)

        setattr(owner, name, heard)

    def __enter__(self):
        for name in sorted({*_METHODS, "to", "__getitem__", "__setitem__", "nonzero"}):
            self.replace(torch.Tensor, name)
        for name in ("tensor", "as_tensor"):  # made on the host, then copied with a wait
            self.replace(torch, name)
        for name in ("masked_select", "equal", "unique", "allclose"):
            self.replace(torch.Tensor, name)
            self.replace(torch, name)

    def __exit__(self, *error):
        for owner, name, original in reversed(self.before):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _said(name: str, args: tuple, kwargs: dict) -> str:
    """What there is to record of a call; nothing where it reads no value."""
    if name == "to":
        # A device object may be where the tensor is anyway: x.to(y.device).
        places = (*args[1:], kwargs.get("device"))
        return "to cpu" if any(place == "cpu" for place in places if isinstance(place, str)) else ""
    if name in ("tensor", "as_tensor"):
        placed = kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor)
        return f"{name} on a device" if placed else ""
    if name in ("__getitem__", "__setitem__"):
        return f"{name} by a mask" if _masks(args[1]) else ""
    return name


def _masks(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


class Recorder:
    """with Recorder() as recorder: ...; recorder.found names what would have waited."""

    def __init__(self):
        self.found: list[str] = []

    def __enter__(self):
        # Operators hear what C++ calls, methods what our own ops do behind the dispatcher.
        self._modes = [_Methods(self.found), _Operators(self.found)]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
