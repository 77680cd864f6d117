"""Whether all ranks see the same folder."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from pathlib import Path

from ..errors import UsageError
from .team import team

_PATIENCE = 5.0  # seconds: file systems of networks remember for a while what is not there
_STEP = 0.1


def same_folder(folder: Path | str, patience: float = _PATIENCE) -> None:
    """UsageError on all ranks when one of them does not see what rank 0 writes into this folder,
    which exists there. To be called by all ranks; one alone looks at nothing. OSError on rank 0
    where it cannot write.
    """
    us, folder = team(), Path(folder)
    if us.alone:
        return
    told, name = us.tell([str(folder), f".distaya-{uuid.uuid4().hex}"])
    mark = folder / name
    if us.first:
        mark.touch(exist_ok=False)
    try:
        us.wait()  # it is there now
        seen = us.gather([socket.gethostname(), _seen(mark, patience)])
    finally:
        if us.first:
            with contextlib.suppress(OSError):
                mark.unlink()
    for rank, (host, sees) in enumerate(seen):
        if not sees:
            raise UsageError(
                f"rank {rank} of {us.world} ({host}) does not see what rank 0 ({seen[0][0]}) "
                f"writes into {told}: the output's folder must be one that all ranks share"
            )


def _seen(mark: Path, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            os.listdir(mark.parent)  # has the file system ask again
            if mark.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP)
