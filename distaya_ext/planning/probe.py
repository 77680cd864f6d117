"""A fresh process that opens the model as a run does, says how much memory it then takes, and
rehearses the worst layer. Started by ask(); a JSON request comes on stdin, the answer is the last
line of stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import DistayaError, InputError, ResourceError, UsageError, one_line

_ERRORS = {kind.__name__: kind for kind in (InputError, ResourceError, UsageError)}


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process answers. Its error comes back as an error of ours."""
    path = os.pathsep.join(p for p in [*sys.path, os.environ.get("PYTHONPATH", "")] if p)
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({**request, "started": time.monotonic()}),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ResourceError(
            f"the rehearsal in a process of its own ended with code {run.returncode}: {last[:200]}"
        )
    told = json.loads(lines[-1])
    if "error" in told:
        raise _ERRORS.get(told["kind"], InputError)(told["error"])
    return told


def resident_bytes() -> int:
    """Memory of this process that is in use now, mapped files that it read included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """See ask()."""
    import distaya_ext.cli.app  # noqa: F401  (what the command imports)
    from distaya_ext.checkpoint import open_checkpoint
    from distaya_ext.compress.blocks import give_back
    from distaya_ext.compress.calibrate import load_calibration
    from distaya_ext.recipe import Recipe

    recipe = Recipe(**request["recipe"])
    checkpoint = open_checkpoint(request["model"], offline=request["offline"])
    careful = recipe.effort == "high" or recipe.max_ram is not None
    give_back(checkpoint, careful=careful)
    calibration = None
    if request["texts"] is not None:
        calibration = load_calibration(request["texts"], recipe, checkpoint)
    source_layers = checkpoint.config.num_hidden_layers
    checkpoint = checkpoint.without(recipe.drop_layers)
    _warm_up(checkpoint)
    process = resident_bytes()
    startup = time.monotonic() - request["started"]  # one clock for all processes
    told: dict[str, Any] = {"process": process, "startup": startup}
    if request["rehearse"]:
        from .clock import rehearse

        told["rehearsal"] = rehearse(
            checkpoint, recipe, source_layers, calibration, request["layer"]
        )
    return told


def _warm_up(checkpoint: Any) -> None:
    """The libraries' own memory comes with their first product, attention and statistic."""
    import torch

    from distaya_ext.models.skeleton import build_skeleton
    from distaya_ext.ops.hessian import Hessian

    build_skeleton(checkpoint.config, checkpoint.dtype)
    x = torch.ones(1, 4, 64, 64, dtype=checkpoint.dtype)
    torch.nn.functional.linear(x, x[0, 0])
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    Hessian(64).add(x.view(-1, 64))


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        told = answer(json.loads(sys.stdin.read()))
    except DistayaError as error:
        told = {"error": str(error), "kind": type(error).__name__}
    except MemoryError as error:
        told = {"error": f"out of memory {one_line(error)}", "kind": "ResourceError"}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
