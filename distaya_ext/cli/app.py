"""`distaya`: the commands, and the one place where errors become a sentence and an exit code.

Exit codes: 0 done, 1 a fault of ours, 2 usage, 3 input cannot be used, 4 numbers gone bad under
--strict, 5 out of memory or disk, 6 a quality gate failed, 7 another rank of the run was lost
(torchrun), 130 interrupted, 143 and 129 told to stop (SIGTERM, SIGHUP). All ranks of a run that
fails end with the code of the one that failed first.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import explain, notes
from . import bench, ranked
from .compress import compress
from .demo import demo
from .distill import distill, heal
from .doctor import doctor
from .eval import evaluate
from .export import export
from .finetune import finetune
from .generate import generate
from .history import history
from .inspect import inspect
from .layers import layers
from .merge import merge
from .plan import plan
from .report import report
from .search import search
from .students import shrink, students
from .verify import verify

INTERRUPTED = 130


class Group(TyperGroup):
    """All commands, under one handler of errors (also when a test runs them in its own process)."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:
        self.arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        self.kept: list[str] = []
        self.quiet = False  # another rank says it
        try:
            with ranked.silence():
                code = super().main(args=self.arguments, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if "--debug" in self.arguments:
                traceback.print_exc()
            sentence, code = explain(error)
            if not ranked.quiet(error):
                typer.echo(f"Error: {'; '.join([sentence, *notes(error)])}", err=True)
            ranked.end(code)
        except SystemExit as stopped:  # SIGTERM, SIGHUP
            if self.kept:
                self._stopped("Stopped", self.kept)
            ranked.end(stopped.code)
        if code == INTERRUPTED:
            self._stopped("Interrupted", self.kept or ["nothing half-written was left behind"])
        ranked.end(code if isinstance(code, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command. What an interruption keeps is noted here: typer makes another of it."""
        try:
            if ranked.under_torchrun():
                with ranked.together(self.arguments):
                    return super().invoke(ctx)
            return super().invoke(ctx)
        except (KeyboardInterrupt, SystemExit) as stop:
            self.kept, self.quiet = notes(stop), ranked.quiet(stop)
            raise

    def _stopped(self, how: str, left: list[str]) -> None:
        if not self.quiet:
            typer.echo(f"{how}; {'; '.join(left)}.", err=True)


app = typer.Typer(
    name="distaya",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distaya {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Make multilingual language models small, and measure what each language paid for it."""


app.command("compress")(compress)
app.command("plan")(plan)
app.command("search")(search)
app.command("layers")(layers)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("distill")(distill)
app.command("heal")(heal)
app.command("finetune")(finetune)
app.command("students")(students)
app.command("shrink")(shrink)
app.command("export")(export)
app.command("merge")(merge)
app.command("report")(report)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("history")(history)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of the console script. Being told to stop cleans up as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice stays
            signal.signal(number, _stop)
    app(prog_name="distaya")


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
