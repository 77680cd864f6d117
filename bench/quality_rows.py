"""What the quality bench compares: patterns, methods, and which of them make sense together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """What is left of the weights. nominal(): bits per weight it takes on disk, scales included."""

    name: str
    sparsity: float = 0.0
    nm: tuple[int, int] | None = None
    bits: int = 0

    @property
    def prunes(self) -> bool:
        return bool(self.nm or self.sparsity)

    def nominal(self, group: int, symmetric: bool, zeros: float | None = None) -> float:
        """Bits per weight: bf16, or codes (all of them, or a bit each and those kept) and scales.

        One bf16 scale per group, and a byte for its zero on asymmetric grids (per row, group 0,
        they are not counted). zeros: the share of zeros found; None: what the pattern asks for.
        """
        if not self.bits:
            return 16.0
        asked = 1 - self.nm[0] / self.nm[1] if self.nm else self.sparsity
        kept = 1 - (asked if zeros is None else zeros)
        codes = min(self.bits, 1 + self.bits * kept) if self.prunes else self.bits
        return codes + ((16 if symmetric else 24) / group if group else 0.0)


PATTERNS = {
    p.name: p
    for p in (
        Pattern("50 %", sparsity=0.5),
        Pattern("4:8", nm=(4, 8)),
        Pattern("2:4", nm=(2, 4)),
        Pattern("2:4 + int4", nm=(2, 4), bits=4),
        Pattern("50 % + int4", sparsity=0.5, bits=4),
        Pattern("int4", bits=4),
        Pattern("int3", bits=3),
    )
}


@dataclass(frozen=True)
class Row:
    """A method at a pattern.

    side: "textbook" (bench/plain.py, no extension) or "ours" (distaya_ext). kind: the method of
    either side, or "search". quality, update (of method dass), permute: ours alone. seeded:
    whether calibration texts matter.
    mlp_only: attention stays dense (so it is compared with rows of the same kind alone).
    """

    id: str
    label: str
    side: str
    kind: str
    pattern: Pattern
    quality: str | None = None
    update: bool = False
    permute: bool = False
    mlp_only: bool = False
    seeded: bool = True

    @property
    def key(self) -> str:
        return f"{self.pattern.name} | {self.id}"

    @property
    def reference(self) -> str:
        """Key of the published method that the row is compared with."""
        best = "sparsegpt" if self.pattern.prunes else "gptq"
        return f"{self.pattern.name} | {best}{'-mlp' if self.mlp_only else ''}"


def rows() -> list[Row]:
    """Every meaningful combination, in the order of the table."""
    return [row for pattern in PATTERNS.values() for row in _rows(pattern)]


def _rows(p: Pattern) -> list[Row]:
    found: list[Row] = []

    def add(id: str, label: str, side: str, kind: str, **more) -> None:
        found.append(Row(id, label, side, kind, p, **more))

    solver = "sparsegpt" if p.prunes else "gptq"
    if p.prunes and not p.bits:
        add("magnitude", "magnitude", "textbook", "magnitude", seeded=False)
        add("wanda", "Wanda", "textbook", "wanda")
        add("ria", "RIA", "textbook", "ria")
    if not p.prunes:
        add("rtn", "RTN", "textbook", "rtn", seeded=False)
    add(solver, "SparseGPT" if p.prunes else "GPTQ", "textbook", solver)
    for quality in ("plain", "default", "high"):
        add(f"ours-{quality}", f"ours, {quality}", "ours", solver, quality=quality)
    if p.nm:
        more = {"quality": "default", "permute": True}
        add("ours-permute", "ours, default, permuted", "ours", solver, **more)
    if not p.prunes:  # int3 takes the bits of 2:4 + int4 and 50 % + int4: one search is for all
        add("ours-search", "ours, search of this size", "ours", "search")
    if p.prunes and not p.bits:
        mlp = {"mlp_only": True}
        add("dass", "DaSS (MLP only)", "textbook", "dass", **mlp)
        add("sparsegpt-mlp", "SparseGPT (MLP only)", "textbook", "sparsegpt", **mlp)
        add(
            "ours-default-mlp", "ours, default (MLP only)", "ours", solver, quality="default", **mlp
        )
        add("ours-dass", "ours, DaSS (MLP only)", "ours", "dass", **mlp)
        add(
            "ours-dass-update", "ours, DaSS + update (MLP only)", "ours", "dass", update=True, **mlp
        )
    return found


def select(wanted: list[str] | None, patterns: list[str] | None) -> list[Row]:
    """Rows by id or side, and by pattern; SystemExit for a name that is none."""
    found = rows()
    known = {row.id for row in found} | {row.side for row in found}
    for name in wanted or []:
        if name not in known:
            raise SystemExit(f"no row {name!r}; there are {', '.join(sorted(known))}")
    for name in patterns or []:
        if name not in PATTERNS:
            raise SystemExit(f"no pattern {name!r}; there are {', '.join(PATTERNS)}")
    return [
        row
        for row in found
        if (not wanted or row.id in wanted or row.side in wanted)
        and (not patterns or row.pattern.name in patterns)
    ]
