"""What this machine can do at best, measured in the same run as the numbers beside it.

    python bench/ceilings.py [--threads 1,2]

fp32 FMA and bf16 dot peaks come from the extension's own register-only loops (one thread, times
the threads), the rest from torch: MKL sgemm, oneDNN fp32 and bf16 products, a sum that only reads
memory. GFLOP/s and GB/s.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from bench import harness

    harness.passive()

import torch

from bench import harness


@dataclass(frozen=True)
class Ceilings:
    """GFLOP/s (read: GB/s) at `threads` threads. None: nothing here can measure it."""

    threads: int
    fp32_peak: float | None  # FMA, registers only
    bf16_peak: float | None  # bf16 dot products into fp32, registers only
    sgemm: float  # torch.mm, fp32
    onednn_fp32: float | None  # the same product through torch's internal oneDNN operator
    bf16_mm: float  # torch.mm on bf16 (bf16 result)
    read: float

    @property
    def fp32(self) -> float:
        """The fp32 ceiling to quote: the peak, else the best product seen."""
        return self.fp32_peak or max(self.sgemm, self.onednn_fp32 or 0.0)

    @property
    def bf16(self) -> float:
        return self.bf16_peak or self.bf16_mm


def measure(threads: int, n: int = 2048, runs: int = 3) -> Ceilings:
    """n: size of the square products."""
    torch.set_num_threads(threads)
    A, B = torch.randn(n, n), torch.randn(n, n)
    out = torch.empty(n, n)
    low = A.bfloat16(), B.bfloat16()
    big = torch.ones(n * n * 16)  # 256 MiB at 2048: beyond any cache
    flop = 2 * n**3 / 1e9
    peak = _peak(threads)

    def rate(work: float, run) -> float:
        run()
        return work / min(harness.sample(run, (), threads).wall for _ in range(runs))

    return Ceilings(
        threads=threads,
        fp32_peak=peak.get("fp32"),
        bf16_peak=peak.get("bf16_dot"),
        sgemm=rate(flop, lambda: torch.mm(A, B, out=out)),
        onednn_fp32=_onednn(A, B, lambda run: rate(flop, run)),
        bf16_mm=rate(flop, lambda: torch.mm(*low)),
        read=rate(big.numel() * 4 / 1e9, lambda: big.sum()),
    )


def _peak(threads: int) -> dict[str, float]:
    """The extension's measured one-thread peaks times threads; {} where it is not built."""
    try:
        from distaya_ext.ops.machine import peak
    except ImportError:
        return {}
    return {name: rate * threads for name, rate in peak().items() if rate}


def _onednn(A, B, rate) -> float | None:
    """torch reaches oneDNN's fp32 kernels only by an operator meant for its own compiler."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None:
        return None
    return rate(lambda: linear(A, B, None, "none", [], ""))


def describe(c: Ceilings) -> str:
    parts = [f"sgemm {c.sgemm:.0f}", f"bf16 mm {c.bf16_mm:.0f}"]
    if c.onednn_fp32:
        parts.append(f"oneDNN fp32 {c.onednn_fp32:.0f}")
    if c.fp32_peak:
        parts.insert(0, f"fp32 FMA peak {c.fp32_peak:.0f}")
    if c.bf16_peak:
        parts.insert(1, f"bf16 dot peak {c.bf16_peak:.0f}")
    flops = ", ".join(parts)
    plural = "s" if c.threads > 1 else ""
    return f"{c.threads} thread{plural}: {flops} GFLOP/s; memory read {c.read:.0f} GB/s"


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default="1,2")
    for threads in parser.parse_args().threads.split(","):
        print(describe(measure(int(threads))), flush=True)


if __name__ == "__main__":
    main()
