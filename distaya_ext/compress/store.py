"""Where activations wait between passes: where they are, in the host's memory, or in files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch


class Store:
    """Keeps tensors (or tuples of tensors and None) under keys.

    folder None keeps them where they are, or with host=True in pinned memory of the host, whence
    they are copied back on get() without a wait of the host. With a folder every tensor is written
    to its own file and mapped back privately on get(), so only what is in use is resident. The bits
    are always the same.
    """

    def __init__(self, folder: Path | None = None, *, host: bool = False):
        # A folder of its own, since several stores may spill side by side.
        self.folder = Path(tempfile.mkdtemp(dir=folder)) if folder is not None else None
        self.host = host
        self._items: dict[Hashable, Any] = {}
        self._files = 0

    @property
    def spills(self) -> bool:
        """Whether what is kept has to be brought back."""
        return self.folder is not None or self.host

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def put(self, key: Hashable, value: Any) -> None:
        """Keep value; an older one under the same key is dropped."""
        self.drop(key)
        self._items[key] = self._out(value) if self.spills else value

    def get(self, key: Hashable) -> Any:
        """The value under key, on the device it came from."""
        value = self._items[key]
        return self._in(value) if self.spills else value

    def drop(self, key: Hashable) -> None:
        """Forget key (nothing happens when it is not there)."""
        value = self._items.pop(key, None)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, _File):
                part.path.unlink(missing_ok=True)

    def blank(self, chunk: int, rows: torch.Tensor) -> None:
        """Zero some rows (windows) of everything under keys that end with this chunk."""
        for key in [key for key in self._items if key[-1] == chunk]:
            value = self.get(key)
            parts = value if isinstance(value, tuple) else (value,)
            new = tuple(
                part.index_fill(0, rows, 0) if isinstance(part, torch.Tensor) else part
                for part in parts
            )
            self.put(key, new if isinstance(value, tuple) else new[0])

    def facts(self, key: Hashable) -> tuple[list[int], str]:
        """(shape, dtype) of the tensor under key, as plain values."""
        value = self._items[key]
        held = value.tensor if isinstance(value, _Away) else value
        return list(held.shape), str(held.dtype).removeprefix("torch.")

    def save(self, key: Hashable, path: Path) -> None:
        """Have the file `path` hold the raw bytes of the tensor under key. One that waits in a file
        of its own is not written again: the file gets a second name, where the disk has links.
        """
        value = self._items[key]
        if isinstance(value, _File):
            try:
                os.link(value.path, path)
            except OSError:
                shutil.copyfile(value.path, path)
        else:
            _write(value.tensor if isinstance(value, _Away) else value, path)

    def load(
        self, key: Hashable, path: Path, shape: list[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Keep what save() has written of a tensor of this shape, on this device."""
        raw = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        self.put(key, raw.view(dtype).view(shape).to(device))

    def clear(self) -> None:
        for key in list(self._items):
            self.drop(key)

    def _out(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._out(part) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        if self.host:
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            return _Away(pinned.copy_(value, non_blocking=True), value.device)
        self._files += 1
        file = _File(self.folder / f"{self._files:08d}.bin", value.shape, value.dtype, value.device)
        _write(value, file.path)
        return file

    def _in(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._in(part) for part in value)
        if isinstance(value, _Away):
            return value.tensor.to(value.device, non_blocking=True)
        if not isinstance(value, _File):
            return value
        count = value.shape.numel()
        mapped = torch.from_file(str(value.path), shared=False, size=count, dtype=value.dtype)
        return mapped.view(value.shape).to(value.device)


def _write(tensor: torch.Tensor, path: Path) -> None:
    # Not numpy's tofile: of a full disk it tells no number.
    path.write_bytes(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy())


class _File:
    """A spilled tensor: its file and how to see it again."""

    __slots__ = ("device", "dtype", "path", "shape")

    def __init__(self, path: Path, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.path, self.shape, self.dtype, self.device = path, shape, dtype, device


class _Away:
    """A tensor on the host and the device it came from."""

    __slots__ = ("device", "tensor")

    def __init__(self, tensor: torch.Tensor, device: torch.device):
        self.tensor, self.device = tensor, device
