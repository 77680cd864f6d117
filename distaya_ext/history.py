"""What was measured here before: one line of JSON per run, kept on this machine.

The command line adds a line after each run that measured something; the library never does.
DISTAYA_HISTORY=off keeps nothing, DISTAYA_HISTORY=FILE keeps it there; else it is
$XDG_STATE_HOME/distaya/history.jsonl, by default in ~/.local/state. Lines hold numbers, names of
models (the last part of their path, and a fingerprint) and fingerprints of recipes and texts: no
paths, no texts, no user. At _MOST bytes the file becomes history.jsonl.1, replacing an older one of
that name, so that two times that size is the most it ever takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

_MOST = 4 << 20  # bytes of a file: some thousands of runs
_LONGEST = 1 << 18  # bytes of a line; a hundred languages take 20 KB
_PATIENCE = 2.0  # seconds to wait for another run that is writing its line
_OFF = {"off", "0", "none"}

# What makes two runs comparable, beside the model they start from.
_SAME = ("command", "texts", "setting")
_FASTER = 1.15  # rates closer than this are noise: measure.clock calls runs contended beyond it
_LARGER = 1.001  # names in a file's header alone do not make a model larger


class Past(NamedTuple):
    """Records, oldest first, and how many lines were none of ours (torn, or foreign)."""

    records: list[dict[str, Any]]
    skipped: int


def file() -> Path | None:
    """Where the history is kept; None: it is switched off, or there is no home."""
    told = os.environ.get("DISTAYA_HISTORY", "")
    if told.lower() in _OFF:
        return None
    if told:
        return Path(told)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    with contextlib.suppress(RuntimeError):  # no home
        return Path(state).expanduser() / "distaya" / "history.jsonl"
    return None


def add(record: Mapping[str, Any]) -> str | None:
    """Append a record, with the time where it has none. Never raises: what went wrong comes back as
    a sentence, None when nothing did or the history is off.

    The line is written in one call behind a lock, so that runs side by side do not mix theirs.
    Numbers that are not finite become null.
    """
    path = file()
    if path is None:
        return None
    try:
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps(_plain({"time": stamp, **record}), ensure_ascii=False, allow_nan=False)
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        if len(data) > _LONGEST:
            return f"this run is not in the history: its line takes {len(data)} bytes"
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, data)
    except (OSError, TypeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"this run is not in the history: {why}"
    return None


def read() -> list[dict[str, Any]]:
    """All records, oldest first; lines that are none of ours are left out, see past()."""
    return past().records


def past() -> Past:
    """All records there are, and how many lines were skipped. OSError where a file cannot be
    read.
    """
    path = file()
    records: list[dict[str, Any]] = []
    skipped = 0
    for each in [] if path is None else [_older(path), path]:
        with contextlib.suppress(FileNotFoundError), open(each, "rb") as lines:
            while line := lines.readline(_LONGEST + 1):
                record = _record(line)
                if record is not None:
                    records.append(record)
                elif line.strip():
                    skipped += 1
    return Past(records, skipped)


def source(record: Mapping[str, Any]) -> str | None:
    """Which model a run began with: the base, or the model itself where there is no other. Only the
    fingerprint counts, a folder may get another name.
    """
    name = record.get("base") or record.get("model")
    return name.rpartition("@")[2] if isinstance(name, str) else None


def earlier(
    records: Sequence[Mapping[str, Any]], record: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Those of the records, oldest first, that `record` can be compared with: the same command on
    the same source model, texts and setting, and not later than it. `record` itself is left out.
    """
    before = records
    if record in records:
        before = records[: list(records).index(record)]
    return [
        each
        for each in before
        if source(each) == source(record) and all(each.get(key) == record.get(key) for key in _SAME)
    ]


def regressions(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What changed between two comparable runs: {what, was, now, worse}, the worse ones first.

    Bytes count from 0.1 %, tokens per second from 15 %, the dnll of a language (nats per token)
    once it leaves the 95 % interval that it had before. Changes below that are left out.
    """
    found = []
    for what, key, least, sign in (
        ("bytes", "bytes", _LARGER, 1),
        ("tokens per second", "tokens_per_second", _FASTER, -1),
    ):
        old, new = _number(before.get(key)), _number(now.get(key))
        if old and new and max(old, new) > least * min(old, new):
            found.append({"what": what, "was": old, "now": new, "worse": sign * (new - old) > 0})
    languages = _languages(now)
    for language, old in _languages(before).items():
        was, new = _number(old.get("dnll")), _number(languages.get(language, {}).get("dnll"))
        low, high = _interval(old, was)
        if was is not None and new is not None and not low <= new <= high:
            found.append(
                {"what": f"dnll of {language}", "was": was, "now": new, "worse": new > high}
            )
    return sorted(found, key=lambda change: not change["worse"])


def _interval(old: Mapping[str, Any], was: float | None) -> tuple[float, float]:
    """The interval a dnll had; where it had none (one sample), the number alone."""
    pair = old.get("dnll_interval")
    if isinstance(pair, list) and len(pair) == 2 and None not in map(_number, pair):
        return pair[0], pair[1]
    return (was, was) if was is not None else (0.0, 0.0)


def _languages(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    told = record.get("languages")
    if not isinstance(told, Mapping):
        return {}
    return {lang: each for lang, each in told.items() if isinstance(each, Mapping)}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of ours, or None. NaN is not JSON, whatever Python's reader thinks of it."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line, parse_constant=_refuse, parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(found, dict) and all(
        isinstance(found.get(key), str) for key in ("time", "command")
    )
    return found if ours else None


def _whole(digits: str) -> int:
    """A whole number that a float can hold, too."""
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse(name: str) -> None:
    raise ValueError(name)


def _plain(value: Any) -> Any:
    """Mappings, lists and numbers as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _append(path: Path, data: bytes) -> None:
    """Behind a lock on the folder: the file itself may be renamed by who holds it."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        _lock(folder)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size + len(data) > _MOST:
                os.replace(path, _older(path))
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            end = os.lseek(handle, 0, os.SEEK_END)
            if end and os.pread(handle, 1, end - 1) != b"\n":  # a run was stopped while it wrote
                data = b"\n" + data
            if os.write(handle, data) != len(data):
                raise OSError("the disk took only part of the line")
        finally:
            os.close(handle)
    finally:
        os.close(folder)


def _lock(handle: int) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(f"another run has held it for {_PATIENCE:g} s") from None
            time.sleep(0.02)


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".1")
