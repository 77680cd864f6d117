"""What `import distaya_ext` does to an interpreter that has torch: one JSON object on stdout.

python imported.py        # "changed": what is another than before; "seconds": [torch, ours]
"""

import json
import locale
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

WRITES: list[str] = []
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod")
CHANGES += ("os.truncate", "os.utime", "os.putenv", "os.unsetenv", "os.chdir", "shutil.rmtree")
CHANGES += ("subprocess.Popen", "os.system", "os.fork", "socket.connect", "tempfile.mkstemp")
watching = False


def audit(event: str, arguments: tuple) -> None:
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            WRITES.append(f"open {path} {mode}")
    elif event in CHANGES:
        WRITES.append(f"{event} {arguments}")


def digest(value: object) -> str:
    return str(hash(repr(value)))


def state() -> dict[str, object]:
    """What a library must leave alone, as JSON."""
    import numpy
    import torch

    handlers = {s.name: repr(signal.getsignal(s)) for s in signal.Signals}
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "threads": sorted(os.listdir("/proc/self/task")),
        "python threads": threading.active_count(),
        "files": sorted(os.listdir("/proc/self/fd")),
        "signals": handlers,
        "warnings": digest(warnings.filters),
        "excepthook": digest((sys.excepthook, threading.excepthook, sys.displayhook)),
        "log": [logging.root.level, len(logging.root.handlers)],
        "locale": locale.setlocale(locale.LC_ALL),
        "recursion": sys.getrecursionlimit(),
        "random": digest(random.getstate()),
        "numpy random": digest(numpy.random.get_state()),
        "torch random": digest(torch.get_rng_state().tolist()),
        "numpy errors": numpy.geterr(),
        "dtype": str(torch.get_default_dtype()),
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cuda": torch.cuda.is_initialized(),
    }


def main() -> None:
    global watching
    began = time.perf_counter()
    import torch  # noqa: F401

    torch_took = time.perf_counter() - began
    before = state()
    finders, modules = list(sys.meta_path), set(sys.modules)
    sys.addaudithook(audit)
    watching = True
    began = time.perf_counter()
    import distaya_ext

    took = time.perf_counter() - began
    watching = False
    after = state()
    print(
        json.dumps(
            {
                "changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]},
                "writes": WRITES,
                "finders": [type(f).__module__ for f in sys.meta_path if f not in finders],
                "modules": sorted({m.split(".")[0] for m in set(sys.modules) - modules}),
                "seconds": [torch_took, took],
                "place": str(Path(distaya_ext.__file__).parent),
            }
        )
    )


if __name__ == "__main__":
    main()
