"""How a run stores what it makes: which format, what each module holds, how many bytes that is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ..checkpoint import Checkpoint, header_bytes
from ..checkpoint.entry import some
from ..errors import UsageError
from ..formats import Grid, ModuleScheme, compressed, late, own
from ..ops import obs as obs_op
from ..ops import pack as pack_op
from ..recipe import PACKED_BITS, Recipe
from .plan import Plan

EMBED_BLOCK = 1 << 24  # weights of the embedding rounded at once
_DENSE = "pack-quantized"  # codes of all weights, whatever is pruned
EMBEDDING = ModuleScheme(8, 0, True, _DENSE, "int8")


class Packing:
    """The format of a run ("dense", "pack-quantized" or "distaya") and the schemes it gives out.

    plan: that of the run, with grids such as the format stores.
    planned: what every quantised module will hold, as far as that is known before the run; schemes:
    what those written hold. notices: what the user should know.
    """

    def __init__(self, recipe: Recipe, plan: Plan, checkpoint: Checkpoint):
        self.plan, self.checkpoint = plan, checkpoint
        self.notices: list[str] = []
        self.dtype = checkpoint.dtype  # of the scales
        shapes = {name: checkpoint.entries[f"{name}.weight"].shape for name in plan}
        self.format = "auto"
        self.format = self._choose(recipe, shapes)
        self._settle(recipe)
        self.planned: dict[str, ModuleScheme] = {}
        if self.format != "dense":
            coded = [name for name, settings in self.plan.items() if settings.bits in PACKED_BITS]
            self.planned = {name: self._scheme(name, *shapes[name]) for name in coded}
        self.ends = self._ends() if recipe.embed_bits else []
        self.planned |= dict.fromkeys(self.ends, EMBEDDING)
        self.schemes: dict[str, ModuleScheme] = {}
        self._counted: dict[str, int] = {}  # weights kept by modules that are encoded

    def encode(self, name: str, grid: Grid) -> dict[str, torch.Tensor]:
        """Tensors by suffix of a module, in the smaller of the encodings its format has."""
        scheme = self.planned[name]
        if scheme.encoding == "bitmask":
            self._counted[name] = int(grid.kept().count_nonzero())
            scheme = self._smaller(name, grid.rows, grid.cols, self._counted[name])
        if self.format == "distaya" and scheme.kind is None:
            kind, nm = pack_op.best_kind(grid.codes, grid.zeros)
            scheme = dataclasses.replace(scheme, kind=kind, nm=nm)
        self.schemes[name] = scheme
        return scheme.encode(grid)

    def start(self, name: str, grid: Grid) -> dict[str, Any]:
        """encode on a GPU, as far as it goes without waiting for it; see finish."""
        scheme = self.planned[name]
        ways = [scheme]
        if scheme.encoding == "bitmask":
            # Of n:m never more is kept than planned, so the bitmask stays the smaller; a share of
            # the stack may leave one of its matrices more than another.
            ways += [] if self.plan[name].nm else [dataclasses.replace(scheme, encoding=_DENSE)]
        found: dict[str, Any] = {way.encoding: late.start(way, grid) for way in ways}
        if self.format == "distaya" and scheme.kind is None:
            found["kind"] = pack_op.kind_facts(grid.codes, grid.zeros)
        return found

    def finish(self, name: str, rows: int, cols: int, told: dict[str, Any]) -> dict:
        """Tensors by suffix, as encode gives them, from what start gave, on the host."""
        scheme = self.planned[name]
        if scheme.encoding == "bitmask":
            self._counted[name] = late.kept(told["bitmask"])
            scheme = self._smaller(name, rows, cols, self._counted[name])
        if "kind" in told:
            kind, nm = pack_op.kind_of(told["kind"], rows * cols)
            scheme = dataclasses.replace(scheme, kind=kind, nm=nm)
        self.schemes[name] = scheme
        return late.finish(scheme, told[scheme.encoding])

    def embedding(
        self, name: str, device: torch.device | str = "cpu", W: torch.Tensor | None = None
    ) -> Grid:
        """Embedding or head rounded to the nearest of 8 bits, symmetric, one scale per row.

        device is where it is computed; the grid is on the CPU. W: the matrix, where it is at hand.
        """
        key = f"{name}.weight"
        W = self.checkpoint.read([key])[key] if W is None else W
        quant = obs_op.Quant(8, 0, symmetric=True, scale_dtype=self.dtype)
        codes = torch.empty(W.shape, dtype=torch.uint8)
        scales = torch.empty(len(W), 1, dtype=self.dtype)
        step = max(1, EMBED_BLOCK // W.shape[1])
        for start in range(0, len(W), step):
            rows = slice(start, start + step)
            part = W[rows].to(device, self.dtype)
            _, codes[rows], scales[rows], _ = obs_op.quantize(part, quant)
        return Grid(codes, scales, None, 8, 0)

    def state(self) -> dict[str, Any]:
        """What encoding so far has noted, as plain values for restore()."""
        schemes = {name: dataclasses.asdict(scheme) for name, scheme in self.schemes.items()}
        return {"schemes": schemes, "counted": self._counted}

    def restore(self, state: dict[str, Any]) -> None:
        told = state["schemes"].items()
        self.schemes = {name: ModuleScheme(**_tuples(scheme)) for name, scheme in told}
        self._counted = dict(state["counted"])

    def config(self) -> dict[str, Any] | None:
        """quantization_config of what was written, None when nothing is packed."""
        if not self.schemes:
            return None
        if self.format == "distaya":
            return own.write(self.schemes)
        return compressed.write(self.schemes, self.checkpoint.dense_linears(self.schemes))

    def bytes_of(self, module: str) -> int:
        """Bytes of what is written for a module's weight, headers apart; see predicted()."""
        entry = self.checkpoint.entries[f"{module}.weight"]
        scheme = self.schemes.get(module) or self.planned.get(module)
        if scheme is None:
            return entry.nbytes
        kept = self._counted.get(module)
        if kept is None and module in self.plan:
            kept = self._kept(module, *entry.shape)
        return scheme.nbytes(*entry.shape, self.dtype, kept)

    def predicted(self) -> int:
        """Bytes of the weight files, headers included, from shapes and schemes alone.

        Of bitmasks that are not encoded yet it is the most: rounding turns some of the weights that
        pruning leaves into zeros.
        """
        total, needs = 0, {}
        for name, entry in self.checkpoint.entries.items():
            module = name.removesuffix(".weight")
            scheme = self.schemes.get(module) or self.planned.get(module)
            if scheme is None:
                needs[name] = (entry.dtype, entry.shape)
                total += entry.nbytes
                continue
            total += self.bytes_of(module)
            for suffix, (dtype, shape) in scheme.tensors(*entry.shape, self.dtype).items():
                needs[f"{module}.{suffix}"] = (dtype, shape or (entry.shape[0] * entry.shape[1],))
        return total + header_bytes(needs)

    def _choose(self, recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> str:
        rounded = [name for name, settings in self.plan.items() if settings.bits is not None]
        if recipe.format == "dense" or (not rounded and recipe.embed_bits is None):
            return "dense"
        coded = [name for name in rounded if self.plan[name].bits in PACKED_BITS]
        self._tell_unpacked([name for name in rounded if name not in coded], whole=not coded)
        if not coded and recipe.embed_bits is None:
            return "dense"
        if recipe.format == "distaya" or recipe.embed_bits is not None:
            return "distaya"
        if any(self.plan[name].bits == 3 for name in coded):
            return "distaya"
        if recipe.modules and recipe.format == "auto":  # patterns are mixed for the sake of size
            smaller = [self._scheme(name, *shapes[name]).encoding for name in coded]
            if "bitmask" in smaller:
                return "distaya"
        return self._standard(recipe, {name: shapes[name][1] for name in coded})

    def _tell_unpacked(self, names: list[str], *, whole: bool) -> None:
        """Note that these modules are rounded to bits that no kernel reads."""
        if not names:
            return
        bits = " and ".join(map(str, sorted({self.plan[name].bits for name in names})))
        known = ", ".join(map(str, PACKED_BITS))
        what = "the rounded weights are" if whole else f"the rounded weights of {some(names)} are"
        self.notices.append(
            f"{bits} bits have no packed form (those of {known} have), so {what} "
            "written as dense ones"
        )

    def _standard(self, recipe: Recipe, columns: dict[str, int]) -> str:
        """pack-quantized where all groups are whole; columns: of the modules to pack."""
        ragged = [name for name, cols in columns.items() if _ragged(self.plan[name].group, cols)]
        if not ragged:
            return "pack-quantized"
        first = ragged[0]
        where = (
            f"{first} has {columns[first]} inputs, which groups of {self.plan[first].group} do not "
            "divide"
        )
        if recipe.format == "pack-quantized":
            raise UsageError(f"format pack-quantized cannot hold this model: {where}")
        self.notices.append(f"{where}: written as distaya instead of pack-quantized")
        return "distaya"

    def _settle(self, recipe: Recipe) -> None:
        """Give the plan grids as the format stores them: rounded scales, columns in order."""
        if self.format == "dense":
            return
        symmetric = bool(recipe.symmetric)
        if self.format == "pack-quantized":
            symmetric = recipe.symmetric is None or recipe.symmetric
            if not symmetric:
                self.notices.append(compressed.ASYMMETRIC)
        self.plan = {
            name: dataclasses.replace(
                settings,
                scale_dtype=self.dtype,
                static=settings.order != "natural",
                symmetric=symmetric,
            )
            if settings.bits in PACKED_BITS
            else settings
            for name, settings in self.plan.items()
        }

    def _scheme(self, name: str, rows: int, cols: int) -> ModuleScheme:
        settings, dense = self.plan[name], self._dense_coded(name, cols)
        standard = self.format == "pack-quantized"
        if standard or dense.bits != 4 or not (settings.sparsity or settings.nm):
            return dense
        return self._smaller(name, rows, cols, self._kept(name, rows, cols))

    def _dense_coded(self, name: str, cols: int) -> ModuleScheme:
        bits, group = self.plan[name].bits, self.plan[name].group
        kind = {3: "int3", 8: "int8"}.get(bits)
        return ModuleScheme(
            bits, group if group < cols else 0, self.plan[name].symmetric, kind=kind
        )

    def _smaller(self, name: str, rows: int, cols: int, kept: int) -> ModuleScheme:
        """Bitmask or dense codes, whichever takes fewer bytes."""
        dense = self._dense_coded(name, cols)
        mask = dataclasses.replace(dense, encoding="bitmask")
        sizes = [s.nbytes(rows, cols, self.dtype, kept) for s in (mask, dense)]
        return mask if sizes[0] < sizes[1] else dense

    def _kept(self, name: str, rows: int, cols: int) -> int:
        """Weights that pruning leaves at most; rounding may turn some of them into zeros."""
        settings = self.plan[name]
        share = settings.dass.dense_neurons if settings.dass is not None else 0.0
        whole = math.ceil(rows * cols * share)  # in dense neurons
        rest = rows * cols - whole
        if settings.nm is not None:
            n, m = settings.nm
            return whole + -(-rest * n // m)
        return whole + rest - int(rest * (settings.sparsity or 0.0))

    def _ends(self) -> list[str]:
        """The embedding, and the head where it is another matrix."""
        architecture, entries = self.checkpoint.architecture, self.checkpoint.entries
        tied = self.checkpoint.tied
        ends = [architecture.embed] if tied else [architecture.embed, architecture.head]
        return [name for name in ends if f"{name}.weight" in entries]


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _ragged(group: int, cols: int) -> bool:
    return 0 < group < cols and cols % group != 0
