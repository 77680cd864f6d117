"""Compressions in processes of their own that are really killed; started by forked.Forks.

Reads a line of JSON per run from stdin and answers with one on stdout. Processes are forked from
this one, which has imported everything, so that a run costs what it computes; it has one thread,
which fork needs, and asserts that.

    source, out, recipe   what to compress: fields of a recipe, and where
    windows, length       of the calibration; 0: none
    after                 seconds until it is killed
    op                    its durable operation (see count_operations) at which it is killed
    share                 what keep.SHARE is, None: as it is
    unchecked             nobody looks beforehand whether the disk has room
    signal, layer         a signal sent to the run, by itself, when this layer is done
    wait                  a file: written when the first layer is kept; the run waits till it goes
"""

import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import tiny
import torch

from distaya_ext.cli import app
from distaya_ext.compress import compress, driver, events, keep
from distaya_ext.errors import notes
from distaya_ext.resume import work

_REPLY = os.dup(1)


def count_operations(kill_at: int | None) -> list[str]:
    """Number what a run does to the disk for good, and be killed at one: a file half-written,
    before an fsync, before and behind a rename, a record half-appended, before a link or a removal.
    """
    done: list[str] = []

    def here(what: str) -> bool:
        done.append(what)
        return len(done) == kill_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def before(name: str, behind: bool = False):
        real = getattr(os, name)

        def wrapped(*args, **kwargs):
            if here(name):
                die()
            found = real(*args, **kwargs)
            if behind and here(f"{name} done"):
                die()
            return found

        setattr(os, name, wrapped)

    kept, append = work.put, os.write

    def put(path, write):
        def half(beside):
            write(beside)
            if here(f"write {path.name}"):
                os.truncate(beside, beside.stat().st_size // 2)
                die()

        return kept(path, half)

    def part(handle, data):
        if here("append"):
            append(handle, bytes(data)[: len(data) // 2])
            die()
        return append(handle, data)

    work.put, os.write = put, part
    for name, behind in (("fsync", False), ("replace", True), ("link", False), ("unlink", False)):
        before(name, behind)
    return done


def run(order: dict) -> dict:
    """One compression in this process."""
    if order.get("share") is not None:
        keep.SHARE = order["share"]
    if order.get("unchecked"):
        driver.check_disk = lambda folder, needed: None
    counted = count_operations(order.get("op"))
    told: dict = {"resumed": [], "notices": []}

    def on_event(event):
        match event:
            case events.Resumed(done, _):
                told["resumed"].append(done)
            case events.Notice(message):
                told["notices"].append(message)
            case events.LayerDone(layer, _, _):
                if layer == order.get("layer"):
                    os.kill(os.getpid(), order["signal"])
                if "wait" in order and layer == 1:
                    Path(order["wait"]).touch()
                    while Path(order["wait"]).exists():
                        time.sleep(0.01)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, app._stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    windows = tiny.windows(order["windows"], order["length"]) if order["windows"] else None
    recipe = tiny.recipe(**order["recipe"])
    code, sentence, error = 0, "", None
    try:
        compress(
            order["source"], order["out"], recipe, windows, on_event=on_event,
            overwrite=order.get("overwrite", False), restart=order.get("restart", False),
        )  # fmt: skip
    except Exception as failed:
        error = failed
        sentence, code = app.explain(failed)
    except KeyboardInterrupt as stopped:
        error, code = stopped, app.INTERRUPTED
    except SystemExit as stopped:
        error, code = stopped, stopped.code
    kept = notes(error) if error is not None else []
    return {"code": code, "sentence": sentence, "kept": kept, "operations": counted, **told}


def fork(order: dict) -> dict:
    """The same in a child; {"code": -9} when it was killed."""
    answer = Path(order["answer"])
    answer.unlink(missing_ok=True)
    assert len(os.listdir("/proc/self/task")) == 1, "fork needs one thread"
    start = time.perf_counter()
    if (child := os.fork()) == 0:
        try:
            told = run(order)
            answer.write_text(json.dumps(told))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(99)
        os._exit(0)
    if "after" in order:
        time.sleep(order["after"])
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told = json.loads(answer.read_text()) if answer.exists() else {"code": status}
    return {**told, "seconds": time.perf_counter() - start}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("warm"):  # imports what a run needs
            compress(order["source"], order["out"], tiny.recipe(nm="2:4", bits=4), tiny.windows())
            shutil.rmtree(order["out"])
            told = {"code": 0}
        else:
            told = fork(order)
        os.write(_REPLY, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    main()
