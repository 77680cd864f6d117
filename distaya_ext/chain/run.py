"""run_chain(): drop layers, compress, heal, evaluate; a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint import (
    MARKER,
    Staging,
    check_companions,
    check_output,
    locate,
    open_checkpoint,
)
from ..compress.driver import as_run
from ..compress.events import Notice
from ..device import find_device
from ..durable import sync_all
from ..errors import UsageError
from ..finished import complete
from ..ranks import team
from ..recipe import Recipe
from ..resume.identity import difference, fingerprint, model_identity, texts_identity
from . import ready, steps
from .events import StepFinished, StepStarted
from .journal import JOURNAL, Done, WorkFolder, place
from .result import Chained, Step

_OF_COMPRESS = ("results.json", "layers.csv", "languages.csv")  # healing has no say in them
# Fields that do not decide the weights.
_NOT_RUN = {"model", "heal", "evaluate", "max_ram", "max_vram"}


def run_chain(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    texts: Any = None,
    *,
    on_event: steps.OnEvent | None = None,
    on_progress: steps.OnProgress | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str = "cpu",
    offline: bool = False,
    strict: bool = False,
    spill: Path | None = None,
) -> Chained:
    """Run a recipe that chooses layers, heals or evaluates, step by step; see compress().

    Every finished step is kept in a hidden folder beside `out` until the last one is done. The same
    call goes on with the first step that is not; healing goes on from its last checkpoint. When the
    recipe, the model or the texts have changed since, only the steps that this touches are done
    again; where nothing could be kept, UsageError says what differs and restart=True begins anew.

    on_event     also gets the records of chain.events and train.events
    strict       NumericsError as soon as a module is degraded, also where an earlier run without
                 it made the compression; no part of what the steps depend on
    on_progress  what evaluate() tells: tokens scored, tokens in all, language

    In a team of several processes each of them calls this: rank 0 has the folder and says what is
    done next, all do it together.
    """
    us = team()
    tell = on_event if on_event is not None and us.first else lambda event: None
    find_device(device, kernels=True)
    local = Path(model).expanduser()
    fresh = restart or not place(Path(out)).exists()  # else the output may be that of this very run
    if us.first and fresh:
        check_output(Path(out), overwrite=overwrite, source=local if local.is_dir() else None)
    recipe = as_run(recipe, model, texts)
    ready.check(recipe, texts)
    checkpoint = open_checkpoint(model, offline=offline)
    check_companions(checkpoint.folder)
    task = steps.Task(checkpoint, recipe, texts, tell, on_progress, device, offline, strict, spill)
    ready.check_model(task)
    if not us.first:
        return _follow(task, WorkFolder(Path(out)), Path(out))
    with WorkFolder(Path(out), restart=restart) as work:
        done = _Chain(task, work, Path(out), overwrite).go()
        us.tell(["done", sorted(done.kept)])
        return done


def _follow(task: steps.Task, work: WorkFolder, out: Path) -> Chained:
    """Do what rank 0 says, step after step."""
    while True:
        what, told = team().tell()
        if what == "done":
            return Chained.read(out, set(told))
        _run(task, work, what, *told)


def _run(
    task: steps.Task, work: WorkFolder, name: str, dropped: list[int], written: list[str]
) -> None:
    """One step, on all ranks. dropped: the layers that go, as far as they are chosen; written: the
    steps that have written models.
    """
    part, scratch = work.part(name), work.path / f"{name}.scratch"
    match name:
        case "drop":
            steps.drop(task, part, scratch)
        case "compress":
            steps.shrink(task, dropped, part, work.work("compress"))
        case "heal":
            steps.heal(task, work.folder("compress"), part, work.work("heal"))
        case "evaluate":
            steps.measure(task, {n: work.folder(n) for n in written}, part, scratch)


class _Chain:
    """A chain on its way. inputs: what each of its steps depends on, in order."""

    def __init__(self, task: steps.Task, work: WorkFolder, out: Path, overwrite: bool):
        self.task, self.work, self.out, self.overwrite = task, work, out, overwrite
        self.recipe = task.recipe
        self.inputs = _inputs(task)
        self.prints = {name: fingerprint(inputs) for name, inputs in self.inputs.items()}
        self.kept: set[str] = set()

    def go(self) -> Chained:
        last = list(self.prints)[-1]
        if self.work.steps and _is_of(self.out, self.prints[last]):  # killed after the rename
            self.work.remove()
            return Chained.read(self.out, self.kept | set(self.prints))
        check_output(self.out, overwrite=self.overwrite, source=self.task.checkpoint.folder)
        self._reconcile()
        ready.check_disk_space(self.task, self.work)
        self._note(f"steps, in this order: {', '.join(self.prints)}")
        try:
            for name in self.prints:
                self._step(name)
        except BaseException as error:
            self._say_what_is_kept(error)
            raise
        self._publish()
        result = Chained.read(self.out, self.kept)
        self.work.remove()
        return result

    def _reconcile(self) -> None:
        """Keep the steps whose inputs are what they were; forget the others, aloud."""
        held, stale = self.work.steps, None
        for name, mark in self.prints.items():
            if name in held and held[name].fingerprint != mark:
                stale = name
            if stale is not None or not self.work.finished(name):
                break
            self.kept.add(name)
        lost = [n for n in held if n not in self.kept and held[n].seconds is not None]
        if stale is not None:
            what = difference(held[stale].inputs, self.inputs[stale])
        else:
            what = f"its steps were {', '.join(held)} and are {', '.join(self.prints)}"
        if lost and not self.kept:
            raise UsageError(
                f"{self.work.path} holds a run that was stopped, and since then {what}; --restart "
                "begins anew, and with what it was before the run goes on"
            )
        if lost or (stale is not None and self.kept):
            again = [name for name in self.prints if name not in self.kept]
            self._note(
                f"since the run was stopped, {what}; done anew: {', '.join(again)}, kept: "
                f"{', '.join(name for name in self.prints if name in self.kept)}"
            )
        begun = [n for n in held if n in self.prints and held[n].fingerprint == self.prints[n]]
        self.work.forget([n for n in held if n not in self.kept and n not in begun])

    def _step(self, name: str) -> None:
        number, count = list(self.prints).index(name) + 1, len(self.prints)
        self.task.on_event(StepStarted(number, count, name))
        if name not in self.kept:
            start = time.perf_counter()
            if not self.work.begin(name, Done(self.inputs[name], self.prints[name])):
                how = self._dropped() if name != "drop" else []
                written = [n for n in ("compress", "heal") if n in self.prints]
                team().tell([name, [how, written]])
                _run(self.task, self.work, name, how, written)
            self.work.finish(name, round(time.perf_counter() - start, 3))
        if name == "compress":
            steps.judge_fallbacks(self.task, self.work.folder(name), kept=name in self.kept)
        if name == "drop":
            self._note(f"layers that go: {', '.join(map(str, self._dropped()))}")
        seconds = self.work.steps[name].seconds
        self.task.on_event(StepFinished(number, count, name, seconds, name in self.kept))

    def _dropped(self) -> list[int]:
        if "drop" in self.prints:
            return steps.dropped(self.work.folder("drop"))
        return list(self.recipe.drop_layers)

    def _publish(self) -> None:
        """The last model with what the steps tell of it, in place in one rename."""
        final = self.work.folder("heal" if "heal" in self.prints else "compress")
        with Staging(
            self.out, overwrite=self.overwrite, source=self.task.checkpoint.folder
        ) as staging:
            _link_all(final, staging.model)
            for name in _OF_COMPRESS:
                path = self.work.folder("compress") / name
                if path.is_file():
                    (staging.model / name).unlink(missing_ok=True)
                    shutil.copyfile(path, staging.model / name)
            _tell_of_step(staging.model / "training.json")
            for step, name in (("drop", steps.LAYERS), ("evaluate", steps.EVALUATION)):
                if step in self.prints:
                    shutil.copyfile(self.work.folder(step) / name, staging.model / name)
            whole = self.recipe.model_copy(update={"drop_layers": self._dropped()})
            (staging.model / "recipe.yaml").unlink(missing_ok=True)
            (staging.model / "recipe.yaml").write_text(
                f"{MARKER}, version {__version__}\n{whole.to_yaml()}", encoding="utf-8"
            )
            done = [self.work.steps[name] for name in self.prints]
            told = [
                vars(Step(name, step.seconds, step.fingerprint, step.inputs))
                for name, step in zip(self.prints, done, strict=True)
            ]
            steps.write_json(staging.model / JOURNAL, {"version": __version__, "steps": told})
            complete(staging.model, "compress", self.inputs[list(self.inputs)[-1]])
            sync_all(staging.model)
            staging.publish()

    def _say_what_is_kept(self, error: BaseException) -> None:
        done = [name for name in self.prints if self.work.finished(name)]
        going = [n for n in self.prints if n not in done and self.work.work(n).exists()]
        if done or going:
            kept = ", ".join(done + [f"{name} so far" for name in going])
            kept = f"kept in {self.work.path.name}: {kept}; the same command goes on from there"
            self._note(kept)
            error.__notes__ = [kept]  # a step has said it of itself

    def _note(self, message: str) -> None:
        self.task.on_event(Notice(message))


def _inputs(task: steps.Task) -> dict[str, dict[str, Any]]:
    """What every step of the chain depends on, in the order they are done."""
    recipe, found = task.recipe, {}
    fields = recipe.model_dump(mode="json", exclude=_NOT_RUN)
    fields["calibration"].pop("path")  # where the texts lie decides nothing, see texts
    texts = task.texts if task.texts is not None else recipe.calibration.path
    common = {
        "version": __version__,
        "device": find_device(task.device).type,
        "model": model_identity(task.checkpoint.folder),
    }
    before = None

    def add(name: str, **own: Any) -> None:
        nonlocal before
        found[name] = {"recipe": own.pop("recipe"), **common, **own, "before": before}
        before = fingerprint(found[name])

    if not isinstance(recipe.drop_layers, list):
        chosen = {key: fields[key] for key in ("drop_layers", "calibration")}
        add("drop", recipe=chosen, texts=texts_identity(texts))
    learns = ready.learns(recipe)
    add("compress", recipe=fields, texts=texts_identity(texts if learns else None))
    if recipe.heal is not None:
        spec = recipe.heal.model_dump(mode="json", exclude={"path", "teacher", "save_every"})
        named = recipe.heal.teacher
        teacher = None if named is None else locate(named, offline=task.offline)
        add(
            "heal",
            recipe={"heal": spec},
            texts=texts_identity(steps.heal_texts(task)),
            teacher=None if teacher is None else model_identity(teacher),
        )
    if recipe.evaluate is not None:
        spec = recipe.evaluate.model_dump(mode="json", exclude={"path"})
        add("evaluate", recipe={"evaluate": spec}, texts=texts_identity(recipe.evaluate.path))
    return found


def _is_of(out: Path, mark: str) -> bool:
    """Whether a folder is what a chain whose last step has this fingerprint wrote."""
    with contextlib.suppress(Exception):
        return Chained.read(out, set()).steps[-1].fingerprint == mark
    return False


def _tell_of_step(record: Path) -> None:
    """The record of healing names the student by its step: the folder it lay in goes."""
    if record.is_file():
        told = json.loads(record.read_text(encoding="utf-8"))
        record.unlink()  # it may be a link to the step's own
        steps.write_json(record, told | {"student": "compress"})


def _link_all(source: Path, target: Path) -> None:
    """The files of a folder once more, without copying where the disk can."""
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.copytree(path, target / path.name)
            continue
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)
