"""Which instructions the kernels that decide the speed must have been compiled to.

A kernel that silently fell back to ordinary arithmetic still computes the right thing; only its
machine code tells. One line of HOT per promise; the names are those that tools/ptx_report.py
prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tools.cubin import Instructions


@dataclass(frozen=True)
class Hot:
    """Every kernel whose name `kernel` finds (a regex), on every architecture that `archs` matches
    (a regex, too), must hold at least one instruction matching each of `needs`, and none matching
    `never`. At least one such kernel must exist."""

    kernel: str
    needs: tuple[str, ...]
    archs: str = r"sm_\w+"
    never: tuple[str, ...] = ()


TF32 = r"HMMA\.1688\.F32\.TF32"

# HMMA: mma.sync; .SP: its 2:4 form; HGMMA: wgmma, on Hopper alone; LDGSTS: cp.async; ACQBULK and
# PREEXIT: early launches, on Hopper alone in what ships for it.
HOT = (
    # Hessians of 16-bit X: <X, rows that start on 16 bytes, cross moment>
    Hot(r"syrk_kernel<bf16, ", (r"HMMA\.16816\.F32\.BF16", r"LDSM")),
    Hot(r"syrk_kernel<f16, ", (r"HMMA\.16816\.F32$", r"LDSM")),
    Hot(r"syrk_kernel<\w+, true, ", (r"LDGSTS",)),
    # C += alpha A B in fp32 out of three tf32 products; obs and the inverse use it as it is
    Hot(r"gemm_kernel<", (TF32, r"LDGSTS")),
    Hot(r"cholesky_cuda/(step_kernel<|panel_kernel)", (TF32, r"LDGSTS")),
    Hot(r"inverse_cuda/finish_rows_kernel", (TF32, r"LDGSTS")),
    # Logits of 16-bit states and weights
    Hot(r"product_kernel<bf16>", (r"HMMA\.16816\.F32\.BF16", r"LDSM", r"LDGSTS")),
    Hot(r"product_kernel<f16>", (r"HMMA\.16816\.F32$", r"LDSM", r"LDGSTS")),
    # multiply_kernel<terms, y, tiles of 8 tokens, parts, body>; body 0: int4, 1: int8, 2: 2:4
    Hot(r"multiply_kernel<bf16, .*, [01]>", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS")),
    Hot(r"multiply_kernel<f16, .*, [01]>", (r"HMMA\.16816\.F32$", r"LDGSTS")),
    Hot(r"multiply_kernel<bf16, .*, 2>", (r"HMMA\.SP\.16832\.F32\.BF16", r"LDGSTS")),
    Hot(r"multiply_kernel<f16, .*, 2>", (r"HMMA\.SP\.16832\.F32$", r"LDGSTS")),
    # pair_kernel<terms, 2:4, tokens>: many tokens, weights from registers
    Hot(r"pair_kernel<bf16, false", (r"HGMMA\.64x\d+x16\.F32\.BF16", r"LDGSTS"), archs="sm_90a"),
    Hot(r"pair_kernel<f16, false", (r"HGMMA\.64x\d+x16\.F32$", r"LDGSTS"), archs="sm_90a"),
    Hot(r"pair_kernel<bf16, true", (r"HGMMA\.SP\.64x\d+x32\.F32\.BF16", r"LDGSTS"), archs="sm_90a"),
    Hot(r"pair_kernel<f16, true", (r"HGMMA\.SP\.64x\d+x32\.F32$", r"LDGSTS"), archs="sm_90a"),
    Hot(r"(multiply|pair|add_splits)_kernel", (r"ACQBULK", r"PREEXIT"), archs="sm_90a"),
)


def check(code: Instructions, table: tuple[Hot, ...] = HOT) -> tuple[list[str], list[str]]:
    """(what was found, one line per promise and architecture; what was not, one sentence each)."""
    found, wrong = [], []
    archs = list(dict.fromkeys(arch for _, arch in code))
    for hot in table:
        for arch in (a for a in archs if re.fullmatch(hot.archs, a)):
            kernels = {k: c for (k, a), c in code.items() if a == arch and re.search(hot.kernel, k)}
            if not kernels:
                wrong.append(f"no kernel on {arch} is called {hot.kernel}")
                continue
            before = len(wrong)
            for kernel, counts in sorted(kernels.items()):
                for want in hot.needs:
                    if not any(re.match(want, op) for op in counts):
                        wrong.append(f"{kernel} on {arch} holds no instruction {want}")
                for refused in hot.never:
                    if any(re.match(refused, op) for op in counts):
                        wrong.append(f"{kernel} on {arch} holds the instruction {refused}")
            if len(wrong) == before:
                of = f"{len(kernels)} kernel{'s' * (len(kernels) > 1)}"
                found.append(f"{arch} {hot.kernel}: {' '.join(hot.needs)} in {of}")
    return found, wrong
