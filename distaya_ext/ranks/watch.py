"""Knowing when another rank fails, is killed or hangs, and ending this one with a sentence.

Two threads. One talks to the store, about once a second: it gives a sign of life, and looks for a
failure that was published, for processes of this host that are gone, and for ranks that have given
no sign of life for SILENCE seconds by this machine's own clock. The other one minds the first,
which hangs where the store does, and the main thread: that is interrupted when a rank is lost, and
where it has not ended GRACE seconds later (it may be deep in another library) the process ends
without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import LostError, add_note, explain, notes, one_line
from .board import Board, Failure
from .process import Process

SILENCE = 18.0  # seconds without a sign of life after which a rank counts as lost
GRACE = 8.0  # seconds that the main thread has to end by itself
_BEAT = 1.0  # seconds between two looks
_PAUSED = 5.0  # a look that comes so late says that this process itself was stopped
_NEWS = 4.0  # seconds to wait for news of why a collective failed; above _CLOSING
_CLOSING = 2.5  # seconds from losing the store to saying so; above _BEAT, see _absent
_ENDING = 0.2  # seconds from when a process closes its connections to when it is gone
_ANSWER = 5.0  # seconds that the store has to answer where nobody else is waiting
_SIGNAL = signal.SIGUSR2  # what interrupts the main thread


class Watch:
    """check(), lost() and ending() are for the team and for joined(); start() begins, close() ends.

    board: a connection that is this thread's own. begun(): collectives that this rank has begun.
    """

    def __init__(self, board: Board, silence: float = SILENCE):
        self.rank, self.world = board.rank, board.world
        self.processes: list[Process] = []  # of all ranks, in order, once it has started
        self.silence = silence
        self.begun: Callable[[], int] = lambda: 0
        self._torchrun = Process.parent() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._main, self._talks = board, board.again()
        self._failure: Failure | None = None
        self._known, self._look, self._closed = (threading.Event() for _ in range(3))
        self._lock = threading.Lock()
        self._raised = False  # the main thread knows of the failure
        self._ended = False  # its command has ended
        self._round = self._turned = time.monotonic()  # when the store has last answered
        self._told = [(0, self._round)] * self.world  # by rank: signs of life, when they changed
        self._begun = [0] * self.world
        self._store_lost = False
        self._cut_off = False  # that the store was lost is all that is known
        self._absent: set[int] = set()  # of this host, when the store was lost
        self._before: Any = None  # the handler of _SIGNAL
        self._around: Any = None  # the exception in whose handling the run takes place, if any

    def start(self, processes: list[Process]) -> None:
        self.processes = processes
        self._round = self._turned = time.monotonic()
        self._told = [(0, self._round)] * self.world
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(_SIGNAL, self._interrupted)
            self._around = sys.exc_info()[1]
        for target in (self._talk, self._mind):
            threading.Thread(target=target, daemon=True, name=f"distaya{target.__name__}").start()

    def close(self) -> None:
        """To be called by all ranks, whose commands have ended well."""
        self._ended = True
        self._closed.set()
        self._ask(self._main.leave)
        self._linger()  # nobody is gone before all know that all has ended well
        self._stop()

    def _stop(self) -> None:
        self._closed.set()
        self._look.set()
        with self._lock:  # or a signal comes when nobody hears it any more
            if self._before is not None:
                signal.signal(_SIGNAL, self._before)
                self._before = None

    # ---- what the main thread asks ----

    def check(self) -> None:
        """LostError when another rank has failed or is lost."""
        if self._known.is_set():
            self._note_raised()
            raise self._error()

    def lost(self, error: Exception) -> Exception:
        """What to raise for a backend's error about another rank. Waits a moment for news of it."""
        self._look.set()
        if not self.processes:  # nobody looks yet
            self._without_store("was killed or lost")
        elif not self._known.wait(_NEWS):
            self._learn(self._unanswered(error))
        self._note_raised()
        return self._error()

    def _note_raised(self) -> None:
        """The main thread is not interrupted where it cleans up."""
        self._raised |= threading.current_thread() is threading.main_thread()

    def ending(self, error: BaseException) -> BaseException:
        """What this rank ends with, for an error that has left its command: that error, or a
        LostError with its notes where another rank's failure is the reason.

        Its `quiet` says whether another rank tells the user. The failure is published.
        """
        self._ended = True
        own = self._own(error)
        if own is not None and own.kind == "stopped":
            self._look.set()  # torchrun stops everyone when it has seen a rank end
            self._known.wait(_NEWS if own.code == 128 + signal.SIGTERM else 0)
        record = self._failure
        if record is None and own is not None:
            record = self._ask(lambda: self._main.publish(own)) or own
        record = record or self._failure or self._unanswered(LostError(str(error)))
        self._failure = record
        told = own is not None and own.kind != "lost" and own.sentence == record.sentence
        found = error if told else self._error(record)
        if found is not error:
            for note in notes(error):
                add_note(found, note)
        found.quiet = not self._speaks(record, GRACE + 2)  # type: ignore[attr-defined]
        self._ask(self._main.leave)
        if self._main.hosts:
            self._linger()
        self._stop()
        return found

    # ---- failures ----

    def name(self, rank: int) -> str:
        if not self.processes:
            return f"rank {rank} of {self.world}"
        process = self.processes[rank]
        return f"rank {rank} of {self.world} (process {process.pid} on {process.host})"

    def _own(self, error: BaseException) -> Failure | None:
        """The failure that this rank's error is; None where it is about another rank's."""
        if getattr(error, "failure", None) is not None:
            return None
        if isinstance(error, KeyboardInterrupt):
            kind, sentence, code = "stopped", "was interrupted", 128 + signal.SIGINT
        elif isinstance(error, Exception):
            kind, (sentence, code) = "error", explain(error)
        else:
            code = getattr(error, "code", 1) or 0
            code = code if isinstance(code, int) else 1
            kind, sentence = "stopped", f"was stopped (exit code {code})"
            if code - 128 in iter(signal.Signals):
                sentence = f"was told to stop ({signal.Signals(code - 128).name})"
        return Failure(self.rank, Process.own().host, kind, sentence, code)

    def _error(self, record: Failure | None = None) -> LostError:
        record = record or self._failure
        assert record is not None
        said = record.sentence
        if record.kind != "lost":
            said = f"rank {record.rank} of {self.world} ({record.host})"
            said += f": {record.sentence}" if record.kind == "error" else f" {record.sentence}"
        found = LostError(said)
        found.exit_code, found.failure = record.code, record  # type: ignore[attr-defined]
        return found

    def _lost(self, rank: int, sentence: str) -> Failure:
        host = self.processes[rank].host if self.processes else Process.own().host
        return Failure(rank, host, "lost", sentence, LostError.exit_code)

    def _gone(self, left: Callable[[int], bool] = lambda rank: False) -> Failure | None:
        """A rank of this host that is not there any more, or what has started this one. left():
        ranks that do not count.
        """
        for rank in range(len(self.processes)):
            if self._is_gone(rank) and not left(rank):
                return self._lost(rank, f"{self.name(rank)} was killed or lost")
        if self._torchrun is not None and self._torchrun.gone(self._torchrun.place):
            said = f"the torchrun of {self.name(self.rank)} was killed or lost"
            return self._lost(self.rank, said)
        return None

    def _is_gone(self, rank: int) -> bool:
        if not self.processes:
            return False
        return self.processes[rank].gone(self.processes[self.rank].place)

    def _unanswered(self, error: Exception) -> Failure:
        """A backend's error that nothing is known about."""
        said, mine = one_line(error), self.begun()
        late = [r for r in range(self.world) if r != self.rank and self._begun[r] < mine]
        if late and ("timed out" in said.lower() or "timeout" in said.lower()):
            who = ", ".join(self.name(r) for r in late)
            has = "has" if len(late) == 1 else "have"
            return self._lost(late[0], f"{who} {has} not come within {self._main.patience:g} s")
        who = self.name(self.rank)
        return self._lost(self.rank, f"a rank that {who} waits for does not answer: {said}")

    def _learn(self, failure: Failure) -> None:
        """The first failure that this process knows of is the one it ends for."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
            self._known.set()

    # ---- who tells the user ----

    def _speaks(self, record: Failure, patience: float) -> bool:
        """Whether this rank tells the user of it: rank 0, and where that is lost or does not come
        to it, one of the others.
        """
        if self.rank == 0:
            return self._ask(self._main.take_word) is not False
        deadline = time.monotonic() + patience
        lost = record.kind == "lost" and record.rank == 0
        while not lost and time.monotonic() < deadline:
            taken = self._ask(self._main.word_taken)
            if taken:
                return False
            if taken is None:
                break
            lost = self._is_gone(0)
            time.sleep(0.1)
        won = self._ask(self._main.take_word)
        if won is not None:
            return won
        if not (lost or self._cut_off):  # rank 0 has told it or will
            return record.kind == "error" and record.rank == self.rank
        if not self.processes:  # one of each host where rank 0 lives, too
            return self._torchrun is None or os.environ.get("LOCAL_RANK", "0") == "0"
        here = Process.own().place
        beside = [r for r, p in enumerate(self.processes) if p.place == here and r < self.rank]
        return set(beside) <= self._absent

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer; None when it is gone or does not come."""
        answers: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        if self._store_lost:
            return None
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER)
        if not answers:
            self._store_lost = True
        return answers[0] if answers else None

    def _linger(self) -> None:
        """Wait a moment for all others to leave, as who keeps the store does for them."""
        deadline = time.monotonic() + _ANSWER
        for rank in range(self.world):
            while time.monotonic() < deadline and not self._is_gone(rank):
                if self._ask(lambda r=rank: self._main.left(r)) is not False:
                    break
                time.sleep(0.05)

    # ---- the thread that talks ----

    def _talk(self) -> None:
        count = 0
        while not self._closed.is_set():
            count += 1
            try:
                self._turn(count)
            except RuntimeError:
                time.sleep(_ENDING)
                self._absent = {r for r in range(len(self.processes)) if self._is_gone(r)}
                if not self._closed.wait(_CLOSING):  # the store closes in a normal end, too
                    self._without_store("was killed or lost")
                return
            self._look.wait(_BEAT)
            self._look.clear()

    def _turn(self, count: int) -> None:
        board = self._talks
        board.beat(count, self.begun())
        gone, silent = self._gone(board.left), self._silent(board.beats())
        # Behind those looks: a rank publishes before it ends.
        failure = board.failure()
        if failure is None and (found := self._failure or gone or silent):
            failure = board.publish(found)
        self._round = self._turned = time.monotonic()
        if failure is not None and (failure.rank != self.rank or failure.kind == "lost"):
            self._learn(failure)

    def _silent(self, beats: list[tuple[int, int]]) -> Failure | None:
        """A rank that is silent for too long; the time this process was stopped itself is no
        silence of the others.
        """
        now = time.monotonic()
        paused = now - self._turned > _PAUSED
        for rank, (count, begun) in enumerate(beats):
            self._begun[rank] = begun
            if paused or count != self._told[rank][0]:
                self._told[rank] = (count, now)
        for rank, (_, when) in enumerate(self._told):
            if now - when > self.silence:
                how = f"has given no sign of life for {self.silence:g} s"
                return self._lost(rank, f"{self.name(rank)} {how}")
        return None

    def _without_store(self, how: str) -> None:
        self._store_lost = self._cut_off = True
        host = f"{self.name(0)} or the torchrun beside it {how}"
        self._learn(self._gone(lambda rank: rank not in self._absent) or self._lost(0, host))

    # ---- the thread that minds the others ----

    def _mind(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(0.25):
            now = time.monotonic()
            if now - last > _PAUSED:
                self._round = now
            last = now
            if not self._known.is_set() and now - self._round > self.silence:
                self._without_store(f"has not answered for {self.silence:g} s")
            if self._known.is_set():
                self._end_main()
                return

    def _end_main(self) -> None:
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            with self._lock:
                if self._before is not None and not (self._raised or self._ended):
                    signal.pthread_kill(threading.main_thread().ident, _SIGNAL)
            if self._closed.wait(0.5) or self._ended:
                return
        record = self._failure
        if record is None or self._ended:
            return
        if self._speaks(record, 2.0):
            os.write(2, f"Error: {self._error(record)}\n".encode())
        if self._main.hosts:
            self._linger()
        os._exit(record.code)

    def _interrupted(self, number: int, frame: Any) -> None:
        """In the main thread. Where that cleans up, since it fails itself or was told to stop, it
        ends by itself, too.
        """
        cleans_up = sys.exc_info()[1] is not self._around
        if self._failure is not None and not (self._raised or self._ended or cleans_up):
            self._raised = True
            raise self._error()


def leave(code: int) -> NoReturn:
    """End this process at once: what a backend still waits for would hold its normal end up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
