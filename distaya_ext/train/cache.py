"""The k most probable next tokens of a teacher at every position of a text, written once.

Shards of whole rows, safetensors: `values` float16 [rows, positions, k], log p of the k tokens,
largest first; `ids` which they are, uint16 where the vocabulary allows and int32 elsewhere; `rest`
float16 [rows, positions], the log of the probability of all others. Position t predicts the token
at t + 1, so there is one less than a row has tokens. What losses.sparse_divergence makes of it does
not depend on the temperature it is used at.

The bytes are known before the first forward pass, to the last one. A shard appears under its name
only when it is whole, so a run that was killed goes on at the first one that is missing. Ranks
share the shards that are missing; whoever writes a shard writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checkpoint import Checkpoint
from ..durable import write_whole
from ..errors import InputError, ResourceError, UsageError
from ..ranks import team
from . import losses
from .head import chunk_tokens, final_hidden, head_logits

_ABOUT = "cache.json"
_SHARD_BYTES = 64 << 20
_NAMES = {torch.float16: "F16", torch.uint16: "U16", torch.int32: "I32"}
_FORWARD_TOKENS = 4096  # of the teacher at once

OnRows = Callable[[int, int], None]  # rows written so far, rows in all


@dataclass(frozen=True)
class Layout:
    """Sizes of a cache: `rows` of `positions` next tokens each, k of `vocabulary` tokens kept."""

    rows: int
    positions: int
    k: int
    vocabulary: int
    about: str = "{}"  # what cache.json holds: the fingerprint

    def __post_init__(self) -> None:
        if self.k > self.vocabulary:
            raise UsageError(
                f"a cache of the {self.k} most probable tokens was asked for, and the vocabulary "
                f"has {self.vocabulary}"
            )

    @property
    def ids_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32

    @property
    def position_bytes(self) -> int:
        return self.k * (2 + self.ids_dtype.itemsize) + 2

    @property
    def shards(self) -> list[slice]:
        """The rows of each shard."""
        each = max(1, _SHARD_BYTES // (self.positions * self.position_bytes))
        return [slice(i, min(i + each, self.rows)) for i in range(0, self.rows, each)]

    def tensors(self, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of what a shard of so many rows holds."""
        shape = (rows, self.positions)
        return {
            "values": (torch.float16, (*shape, self.k)),
            "ids": (self.ids_dtype, (*shape, self.k)),
            "rest": (torch.float16, shape),
        }

    def shard_bytes(self, rows: int) -> int:
        """Bytes of the file of a shard: the length of its header, the header, the tensors."""
        held = self.tensors(rows)
        # The library puts wider types first, then floats before integers, then goes by name.
        order = sorted(held, key=lambda n: (-held[n][0].itemsize, held[n][0] != torch.float16, n))
        header, start = {}, 0
        for name in order:
            dtype, shape = held[name]
            stop = start + dtype.itemsize * torch.Size(shape).numel()
            about = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            header[name], start = about, stop
        text = len(json.dumps(header, separators=(",", ":")))
        return 8 + (text + 7) // 8 * 8 + start

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        files = sum(self.shard_bytes(part.stop - part.start) for part in self.shards)
        return files + len(self.about.encode())

    def fitting(self, limit: int) -> int:
        """The largest k whose cache takes no more than `limit` bytes; 0 when none does."""
        low, high = 0, self.vocabulary
        while low < high:  # bytes grow with k
            middle = (low + high + 1) // 2
            size = Layout(self.rows, self.positions, middle, self.vocabulary, self.about).nbytes
            low, high = (middle, high) if size <= limit else (low, middle - 1)
        return low

    def check(self, folder: Path, limit: int | None, written: int = 0) -> None:
        """ResourceError when the cache is larger than `limit` or, but for the bytes written
        already, than the disk of `folder` has room for.
        """
        need = self.nbytes
        what = f"a cache of the {self.k} most probable tokens takes {need} bytes"
        if limit is not None and need > limit:
            raise ResourceError(f"{what}, more than the {limit} allowed; {_fits(self, limit)}")
        above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(above).free
        if need - written > free:
            raise ResourceError(
                f"{what} ({need - written} still to be written), more than the {free} free on the "
                f"disk; {_fits(self, free + written)}"
            )


def _fits(layout: Layout, room: int) -> str:
    k = layout.fitting(room)
    return f"{k} would fit" if k else "not even one token a position would fit"


def fingerprint(teacher: Checkpoint, precision: str, ids: torch.Tensor, k: int) -> str:
    """JSON of what a cache depends on: the teacher's files, what it runs in, the text's token ids
    and k.
    """
    text = hashlib.blake2b(ids.cpu().contiguous().numpy().tobytes(), digest_size=16)
    return json.dumps(
        {
            "format": 1,
            "teacher": files_digest(teacher),
            "precision": precision,
            "texts": text.hexdigest(),
            "rows": list(ids.shape),
            "k": k,
        },
        indent=2,
    )


def files_digest(checkpoint: Checkpoint) -> str:
    """Of the files of a model: config.json, and of the weights name, size, time and header."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update((checkpoint.folder / "config.json").read_bytes())
    for path in sorted({entry.path for entry in checkpoint.entries.values()}):
        about = path.stat()
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns} ".encode() + header)
    return digest.hexdigest()


class Cache:
    """A cache on disk. write() makes what is missing of it; rows() reads."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self._each = layout.shards[0].stop if layout.shards else 1

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"rows-{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are not there, or not of their size."""
        sizes = [self.layout.shard_bytes(part.stop - part.start) for part in self.layout.shards]
        paths = [self.path(i) for i in range(len(sizes))]
        return [
            i
            for i, (path, size) in enumerate(zip(paths, sizes, strict=True))
            if not path.is_file() or path.stat().st_size != size
        ]

    def prepare(self, limit: int | None) -> None:
        """Check the room, and that what is there already is of this teacher, text and k; make the
        folder. ResourceError, UsageError.
        """
        about = self.folder / _ABOUT
        if about.is_file():
            self._same(about)
        left = set(self.missing())
        parts = enumerate(self.layout.shards)
        sizes = [self.layout.shard_bytes(p.stop - p.start) for i, p in parts if i not in left]
        self.layout.check(self.folder, limit, sum(sizes))
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.partial"):
            path.unlink()
        if not about.is_file():
            write_whole(about, lambda path: path.write_text(self.layout.about, encoding="utf-8"))

    def _same(self, about: Path) -> None:
        wanted = json.loads(self.layout.about)
        try:
            found = json.loads(about.read_text(encoding="utf-8"))
            differs = [key for key, value in wanted.items() if found.get(key) != value]
        except (ValueError, AttributeError):
            raise UsageError(f"{about} is damaged; remove the folder of the cache") from None
        if differs:
            each = ", ".join(f"{key} {found.get(key)} there, {wanted[key]} now" for key in differs)
            raise UsageError(
                f"the cache in {self.folder} is of another run ({each}); remove it or choose "
                "another work folder"
            )

    def write(
        self,
        model: Any,
        ids: torch.Tensor,
        on_rows: OnRows | None = None,
        missing: list[int] | None = None,
    ) -> None:
        """Run the teacher over ids [rows, length], for this rank's share of the shards that are
        missing (None: those that it finds missing). prepare() was called before. InputError for
        logits that are not finite, and where this rank does not see the folder.
        """
        if not self.folder.is_dir():
            raise InputError(
                f"rank {team().rank} does not see {self.folder}, where the teacher's record is to "
                "be; it must lie where all ranks can write"
            )
        missing = self.missing() if missing is None else missing
        for shard in missing[team().rank :: team().world]:
            part = self.layout.shards[shard]
            held = self._record(model, ids[part])
            write_whole(self.path(shard), lambda path, held=held: save_file(held, path))
            if on_rows is not None:
                on_rows(part.stop, self.layout.rows)

    def check(self) -> None:
        """InputError where this rank does not see a shard that was written."""
        if missing := self.missing():
            raise InputError(
                f"rank {team().rank} does not see {self.path(missing[0])} and {len(missing) - 1} "
                "others of the teacher's record; it must lie where all ranks can read"
            )

    @torch.no_grad()
    def _record(self, model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a shard."""
        shape = self.layout.tensors(len(ids))
        held = {name: torch.empty(size, dtype=dtype) for name, (dtype, size) in shape.items()}
        flat = {name: tensor.flatten(0, 1) for name, tensor in held.items()}
        device = _device(model)
        step = max(1, _FORWARD_TOKENS // ids.shape[1])
        few = chunk_tokens(model.config.get_text_config().vocab_size)
        at = 0
        for start in range(0, len(ids), step):
            rows = ids[start : start + step].to(device)
            hidden = final_hidden(model, rows)[:, :-1].flatten(0, 1)
            for chunk in hidden.split(few):
                logits = head_logits(model, chunk)[..., : self.layout.vocabulary]
                values, which, rest = losses.top(logits, self.layout.k)
                if not bool(torch.isfinite(values[:, 0]).all()):
                    raise InputError("the teacher gives NaN or infinite logits for these texts")
                here = slice(at, at + len(chunk))
                flat["values"][here] = values.to(torch.float16).cpu()
                flat["ids"][here] = which.to(self.layout.ids_dtype).cpu()
                flat["rest"][here] = rest.to(torch.float16).cpu()
                at = here.stop
        return held

    def rows(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """values float16 [n, positions, k], ids int64, rest float16 [n, positions] of rows."""
        found: dict[int, list[torch.Tensor]] = {}
        wanted = numbers.tolist()
        for shard in sorted({number // self._each for number in wanted}):
            # Opened anew each time: a mapping that stays keeps every page it touched resident.
            try:
                with safe_open(self.path(shard), framework="pt") as file:
                    parts = [file.get_slice(name) for name in ("values", "ids", "rest")]
                    for number in wanted:
                        if number // self._each == shard and number not in found:
                            at = number - shard * self._each
                            found[number] = [part[at : at + 1] for part in parts]
            except (SafetensorError, OSError) as error:
                raise InputError(f"the cache of the teacher cannot be read: {error}") from error
        values, ids, rest = (
            torch.cat([found[number][which] for number in wanted]) for which in range(3)
        )
        return values, ids.to(torch.int64), rest


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
