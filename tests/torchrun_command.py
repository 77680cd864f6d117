"""distaya with one more command, `wait`, whose ranks compute (or wait for each other) until they
are stopped; rank 0 prints the process ids of all. As torchrun's script.
"""

import contextlib
import json
import time
from typing import Annotated

import torch
import typer

from distaya_ext.cli import app, ranked
from distaya_ext.errors import add_note
from distaya_ext.ranks import team


def wait(
    how: str, quiet: Annotated[bool, typer.Option("--quiet")] = False, device: str = "cpu"
) -> None:
    us = team()
    us.wait()  # all have come
    with contextlib.ExitStack() as stack:
        stack.push(_note)
        typer.echo(json.dumps([watched.pid for watched in us.watch.processes]))  # now it may end
        if how == "collective" and not us.first:
            time.sleep(600)
        x = torch.ones(64, 64)
        while how == "compute":
            x = (x @ x).clamp(max=1)
        us.wait()


def _note(kind: type, error: BaseException, trace: object) -> None:
    """As a run that has kept something does."""
    if team().first:
        add_note(error, "kept in .out.compress: 3 of 8 layers")


app.app.command("wait")(wait)
ranked.RANKED.add("wait")

if __name__ == "__main__":
    app.main()
