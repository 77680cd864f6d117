"""`distaya inspect`: what a model folder holds, and how sparse and how rounded its weights are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint

_PATTERN_SPANS = (2, 4, 8, 16, 32)
_PATTERN_FULL = 0.25  # share of groups that must hold as many weights as the pattern allows
_GRID_ROWS = 64  # rows looked at for a quantisation grid
_GRID_SHARE = 0.6  # distinct values per kept weight above which a group is not on a grid


@dataclass(frozen=True)
class Linear:
    """One matrix. pattern: "N:M" that every group obeys, or None. bits, group: a grid that the
    weights lie on (group 0 = one for the row), or None. encoding: how its codes are packed, None
    for dense weights; kind: the kernel layout it is loaded into."""

    module: str
    rows: int
    columns: int
    dtype: str
    sparsity: float
    pattern: str | None
    bits: int | None
    group: int | None
    symmetric: bool | None
    encoding: str | None
    kind: str | None
    bytes: int


def inspect(
    model: options.Model,
    modules: Annotated[bool, typer.Option("--modules", help="One line per matrix.")] = False,
    offline: options.Offline = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Print architecture, size, and sparsity, N:M pattern and grid of the weights of MODEL.

    Packed folders (ours, pack-quantized, GPTQ) are read as they are.
    """
    from ..checkpoint import open_checkpoint
    from .output import console, print_json

    checkpoint = open_checkpoint(model, offline=offline, packed=True)
    linears = [look(checkpoint, name) for name in names(checkpoint)]
    facts = summary(checkpoint, linears)
    if json:
        print_json({"model": model, **facts, "linears": [asdict(linear) for linear in linears]})
        return
    out = console()
    for key, value in facts.items():
        out.print(f"{key.replace('_', ' ')}: {value}", markup=False)
    out.print(_table(linears, modules))


def names(checkpoint: Checkpoint) -> list[str]:
    """Modules that compression works on, layer by layer, then quantised embedding and head."""
    linears = checkpoint.linears()
    return linears + sorted(set(checkpoint.stored) - set(linears))


def look(checkpoint: Checkpoint, module: str) -> Linear:
    """Read one matrix and measure it."""
    if module in checkpoint.stored:
        return _look_packed(checkpoint, module)
    name = f"{module}.weight"
    W = checkpoint.read([name])[name]
    zeros = int((W == 0).sum())
    bits, group = grid(W) or (None, None)
    return Linear(
        module=module,
        rows=W.shape[0],
        columns=W.shape[1],
        dtype=str(W.dtype).removeprefix("torch."),
        sparsity=zeros / W.numel(),
        pattern=pattern(W),
        bits=bits,
        group=group,
        symmetric=None,
        encoding=None,
        kind=None,
        bytes=W.nbytes,
    )


def _look_packed(checkpoint: Checkpoint, module: str) -> Linear:
    from ..ops.pack import best_kind

    scheme, found = checkpoint.stored[module].scheme, checkpoint.grid(module)
    kept = found.kept()
    count = int(kept.count_nonzero())
    return Linear(
        module=module,
        rows=found.rows,
        columns=found.cols,
        dtype=f"int{scheme.bits}",
        sparsity=1 - count / kept.numel(),
        pattern=pattern(kept),
        bits=scheme.bits,
        group=scheme.group,
        symmetric=scheme.symmetric,
        encoding=scheme.encoding,
        kind=scheme.kind or best_kind(found.codes, found.zeros)[0],
        bytes=scheme.nbytes(found.rows, found.cols, found.scales.dtype, count),
    )


def pattern(W: torch.Tensor) -> str | None:
    """The N:M pattern with the shortest M that every group of M inputs of W [rows, columns] obeys.

    Any matrix obeys some loose pattern, so a good share of its groups must hold all N. Not all of
    them: rounding turns small kept weights into zeros.
    """
    kept = W != 0
    for m in _PATTERN_SPANS:
        if W.shape[1] % m == 0:
            counts = kept.reshape(W.shape[0], -1, m).sum(dim=2)
            n = int(counts.max())
            if 0 < n < m and (counts == n).float().mean() >= _PATTERN_FULL:
                return f"{n}:{m}"
    return None


def grid(W: torch.Tensor) -> tuple[int, int] | None:
    """(bits, group) of the integer grid that W [rows, columns] lies on, or None.

    The fewest bits win, then the longest group. Found by counting distinct values in groups of
    inputs. 8-bit grids on short groups hold as many levels as weights and are not seen.
    """
    rows = W[:: max(1, W.shape[0] // _GRID_ROWS)].float()
    found: list[tuple[int, int]] = []
    for group in (0, 128, 64, 32):
        span = group or W.shape[1]
        if W.shape[1] % span or (group and span >= W.shape[1]):
            continue
        values = rows.reshape(-1, span).sort(dim=1).values
        levels = (values.diff(dim=1) != 0).sum(dim=1) + 1
        kept = (values != 0).sum(dim=1)
        distinct = levels - (kept < span).long()
        bits = max(2, (int(levels.max()) - 1).bit_length())
        if bits <= 8 and distinct.sum() <= _GRID_SHARE * kept.sum():
            found.append((bits, group))
    return min(found, key=lambda pair: pair[0], default=None)


def summary(checkpoint: Checkpoint, linears: list[Linear]) -> dict[str, Any]:
    """The facts about the whole model."""
    from ..compress.fallbacks import Fallbacks
    from .output import size

    config = checkpoint.config
    ends = (checkpoint.architecture.embed, checkpoint.architecture.head)
    layers = [linear for linear in linears if linear.module not in ends]
    count = sum(linear.rows * linear.columns for linear in layers)
    zeros = sum(linear.sparsity * linear.rows * linear.columns for linear in layers)
    packed = {linear.module for linear in linears if linear.encoding is not None}
    parameters = sum(
        math.prod(x.shape)
        for k, x in checkpoint.entries.items()
        if k.rpartition(".")[0] not in packed or k.endswith(".bias")
    )
    parameters += sum(held.rows * held.cols for held in checkpoint.stored.values())
    share = f"{len(layers)} matrices with {count} weights ({100 * count / parameters:.0f} % of "
    facts = {
        "architecture": checkpoint.architecture.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "parameters": parameters,
        "bytes": checkpoint.nbytes,
        "size": size(checkpoint.nbytes),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "can_be_compressed": f"yes, {share}the parameters)",
        "sparsity": round(zeros / count, 4),
    }
    if checkpoint.scheme is not None:
        inside = [linear for linear in layers if linear.encoding is not None]
        held = sum(linear.rows * linear.columns for linear in inside)
        facts |= {
            "can_be_compressed": f"no, it is quantised already; {share}the parameters)",
            "quantised": f"{checkpoint.scheme.method}, {len(inside)} matrices of the layers",
            "bits_per_weight": round(8 * sum(x.bytes for x in inside) / held, 3) if held else None,
        }
    if checkpoint.adapter is not None:
        facts["adapter"] = _adapter(checkpoint)
    if told := Fallbacks.told(checkpoint.folder):
        facts["fallbacks"] = told
    return facts


def _adapter(checkpoint: Checkpoint) -> str:
    """What stays beside the weights, in words."""
    from ..train.adapter import read_adapter
    from .output import size

    held = read_adapter(checkpoint.adapter, checkpoint)
    ranks = sorted({each.rank for each in held.low_rank.values()})
    total = sum(each.nbytes for each in held.low_rank.values())
    return (
        f"LoRA of rank {' and '.join(map(str, ranks))} beside {len(held.low_rank)} matrices, "
        f"{size(total)}, loaded with the model"
    )


def _table(linears: list[Linear], every: bool) -> Any:
    """One row per matrix, or one per kind of matrix with the range over the layers."""
    from rich.table import Table

    from .output import size

    table = Table()
    for head in (
        "module" if every else "matrix",
        "count",
        "shape",
        "layout",
        "zeros",
        "pattern",
        "grid",
        "stored as",
        "bytes",
    ):
        table.add_column(head, justify="left" if head in ("module", "matrix") else "right")
    kinds: dict[str, list[Linear]] = {}
    for linear in linears:
        parts = linear.module.split(".")
        kinds.setdefault(linear.module if every else ".".join(parts[-2:]), []).append(linear)
    for kind, group in kinds.items():
        low, high = min(x.sparsity for x in group), max(x.sparsity for x in group)
        zeros = (
            f"{100 * low:.1f} %" if high - low < 5e-4 else f"{100 * low:.1f} to {100 * high:.1f} %"
        )
        table.add_row(
            kind,
            str(len(group)),
            _common(f"{x.rows}x{x.columns}" for x in group),
            _common(x.kind or x.dtype for x in group),
            zeros,
            _common(x.pattern or "-" for x in group),
            _common(_grid_name(x) for x in group),
            _common(x.encoding or "dense" for x in group),
            size(sum(x.bytes for x in group)),
        )
    return table


def _grid_name(linear: Linear) -> str:
    if linear.bits is None:
        return "-"
    symmetric = ", sym." if linear.symmetric else ""
    return f"{linear.bits} bits per {linear.group or 'row'}{symmetric}"


def _common(values: Any) -> str:
    found = sorted(set(values))
    return found[0] if len(found) == 1 else "mixed: " + ", ".join(found)
