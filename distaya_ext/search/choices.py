"""What may be done to one matrix, and how many bytes of a file that takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint import Checkpoint
from ..compress.packing import EMBEDDING, Packing
from ..compress.plan import make_plan
from ..compress.settings import Settings
from ..errors import UsageError
from ..formats import ModuleScheme
from ..recipe import GROUPS, PACKED_BITS, Recipe, parse_nm

# The finer and coarser scales fill the gaps between 4 and 3 bits, and reach below int3 with groups.
DEFAULT = "bf16,int8,int4-g32,int4,int3-g32,int3,int3-g0,2:4+int4,mask-50+int4,4:8+int4"

_FORM = re.compile(r"(?:(?:mask-(\d{1,2})|(\d{1,3}:\d{1,3}))\+)?int(\d)(?:-g(\d{1,3}))?")


@dataclass(frozen=True)
class Choice:
    """A pattern, a width, both, or (bits None) the weights as they are.

    name is as the user wrote it; group None is the group of the search.
    """

    name: str
    sparsity: float | None = None
    nm: str | None = None
    bits: int | None = None
    group: int | None = None

    @property
    def dense(self) -> bool:
        return self.bits is None

    @property
    def prunes(self) -> bool:
        return self.sparsity is not None or self.nm is not None

    def fields(self) -> dict[str, Any]:
        """Fields of a recipe (or of a rule in it) that ask for this."""
        named = ("sparsity", "nm", "bits", "group")
        return {k: getattr(self, k) for k in named if getattr(self, k) is not None}


def parse_choices(text: str) -> list[Choice]:
    """Choices of a list such as "bf16,int8,2:4+int4,mask-60+int4,int3-g64".

    mask-S removes S % of the weights anywhere, N:M keeps N of M; -gG sets the inputs per scale.
    UsageError for what no file can hold, for what saves nothing and for a choice named twice.
    """
    found = [_parse(part.strip()) for part in text.split(",")]
    seen: dict[Choice, str] = {}
    for choice in found:
        bare = replace(choice, name="")
        if bare in seen:
            raise UsageError(f"choice {choice.name} is given twice")
        seen[bare] = choice.name
    return found


def _parse(text: str) -> Choice:
    if text in ("bf16", "dense"):
        return Choice(text)
    form = _FORM.fullmatch(text)
    if form is None:
        raise UsageError(
            f"choice {text!r} is not bf16, int8, int4, int3, N:M+int4 or mask-S+int4 "
            "(each but bf16 with -g32, -g64, -g128 or -g0 behind it)"
        )
    share, nm, bits = form[1], form[2], int(form[3])
    group = None if form[4] is None else int(form[4])
    if bits not in PACKED_BITS:
        raise UsageError(f"choice {text}: files hold {', '.join(map(str, PACKED_BITS))} bits")
    if group is not None and group not in GROUPS:
        raise UsageError(f"choice {text}: groups are {', '.join(map(str, GROUPS))}")
    if (share or nm) and bits != 4:
        raise UsageError(
            f"choice {text}: only 4 bits are stored without the pruned weights, so pruning saves "
            f"nothing with {bits}"
        )
    if share is not None and not 0 < int(share) < 100:
        raise UsageError(f"choice {text} removes {share} % of the weights; 1 to 99 can be removed")
    if nm is not None:
        parse_nm(nm)
    return Choice(text, int(share) / 100 if share else None, nm, bits, group)


class Costs:
    """Bytes and settings of every choice for every Linear of a checkpoint.

    common: fields of the recipe that all choices share (group, symmetric, damp, embed_bits ...).
    """

    def __init__(self, checkpoint: Checkpoint, choices: list[Choice], common: dict[str, Any]):
        self.checkpoint, self.choices, self.common = checkpoint, choices, common
        self.names = checkpoint.linears()
        self.settings: dict[Choice, Settings] = {}
        self._schemes: dict[Choice, dict[str, ModuleScheme]] = {}
        self._digits = len(str(checkpoint.nbytes))
        for choice in choices:
            if not choice.dense:
                recipe = self.uniform(choice)
                able = [name for name in self.names if self.fits(name, choice)]
                plan = make_plan(recipe, checkpoint, checkpoint.config.num_hidden_layers)
                packing = Packing(recipe, {name: plan[name] for name in able}, checkpoint)
                self._schemes[choice] = packing.planned
                if able:
                    self.settings[choice] = packing.plan[able[0]]

    def uniform(self, choice: Choice) -> Recipe:
        """The recipe that does the same to every Linear."""
        fields = {"model": str(self.checkpoint.folder), **self.common, **choice.fields()}
        if choice.dense:
            return untouched(fields)
        method = "sparsegpt" if choice.prunes else "gptq"
        return Recipe(**fields, method=method, format="distaya")

    def fits(self, name: str, choice: Choice) -> bool:
        """Whether the matrix can be given this choice: N:M needs whole groups of inputs."""
        if choice.nm is None:
            return True
        return self.shape(name)[1] % parse_nm(choice.nm)[1] == 0

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.checkpoint.entries[f"{name}.weight"].shape
        return rows, columns

    def linear(self, name: str, choice: Choice, header: bool) -> int:
        """Most bytes a Linear's weight takes, with what the file's header says of it or without.

        Of a bitmask it is the most since rounding turns some of the kept weights into zeros.
        """
        entry = self.checkpoint.entries[f"{name}.weight"]
        if choice.dense:
            return entry.nbytes + header * self._header(f"{name}.weight", entry.shape)
        scheme = self._schemes[choice][name]
        rows, columns = entry.shape
        total = scheme.nbytes(rows, columns, self.checkpoint.dtype, _kept(choice, rows, columns))
        if header:
            for suffix, (_, shape) in scheme.tensors(rows, columns, self.checkpoint.dtype).items():
                total += self._header(f"{name}.{suffix}", shape or (rows * columns,))
        return total

    def rest(self, prefix: str | None) -> int:
        """Bytes with headers of what is no Linear of a layer: in layer `prefix`, or outside of all
        layers.
        """
        architecture, total = self.checkpoint.architecture, 0
        linears = {f"{name}.weight" for name in self.names}
        for name, entry in self.checkpoint.entries.items():
            inside = name.startswith(f"{architecture.layers}.")
            ours = name.startswith(f"{prefix}.") if prefix is not None else not inside
            if not ours or name in linears:
                continue
            module = name.removesuffix(".weight")
            if self.common.get("embed_bits") and module in (architecture.embed, architecture.head):
                total += EMBEDDING.nbytes(*entry.shape, self.checkpoint.dtype)
                needs = EMBEDDING.tensors(*entry.shape, self.checkpoint.dtype)
                total += sum(
                    self._header(f"{module}.{s}", shape) for s, (_, shape) in needs.items()
                )
            else:
                total += entry.nbytes + self._header(name, entry.shape)
        return total

    def _header(self, name: str, shape: tuple[int, ...]) -> int:
        """Most bytes that a header of safetensors spends on a tensor: offsets of full length."""
        far = 10**self._digits - 1
        about = {"dtype": "BF16", "shape": list(shape), "data_offsets": [far, far]}
        return len(json.dumps({name: about}, separators=(",", ":"))) - 1


def untouched(fields: dict[str, Any]) -> Recipe:
    """The recipe that changes no Linear; fields: what a search has in common."""
    return Recipe(**{k: v for k, v in fields.items() if k != "quality"}, method="dense")


def _kept(choice: Choice, rows: int, columns: int) -> int | None:
    """Weights that pruning leaves."""
    if choice.nm is not None:
        n, m = parse_nm(choice.nm)
        return rows * columns * n // m
    if choice.sparsity is not None:
        return rows * columns - int(rows * columns * choice.sparsity)
    return None
