"""The walk through a model: from a checked checkpoint to a folder that any transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint import (
    MARKER,
    Checkpoint,
    check_companions,
    check_output,
    copy_companions,
    open_checkpoint,
    write_config,
)
from ..device import find_device
from ..finished import complete
from ..models.depth import cut_json, irregular
from ..models.skeleton import build_skeleton
from ..ranks import same_folder, team
from ..recipe import Recipe
from ..resume import Guest, Work
from ..resume import place as work_place
from . import events, glu
from .beside import Beside
from .blocks import give_back
from .budget import Budget, activation_bytes, check_disk, needs_of, waits_on_host
from .calibrate import CUDA_CHUNK_TOKENS, Calibration
from .capture import Ends, check_tied
from .ferry import Ferry
from .identity import identity
from .keep import Keeper, most_bytes
from .kept import Follower
from .language_report import LanguageReport
from .languages import Mixture
from .layers import Layers
from .left_out import LeftOut
from .packing import Packing
from .plan import make_plan
from .proof import PROOF_WINDOWS, prove
from .replay import Replay
from .report import Report, dump_report, restore_report
from .settings import Settings, from_recipe
from .shared import (
    check_parts,
    parts_of,
    same_for_all,
    shared_calibration,
    spill_folder,
    told_of_ranks,
)
from .store import Store

OnEvent = Callable[[events.Event], None]


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    texts: Any = None,
    *,
    on_event: OnEvent | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str = "cpu",
    offline: bool = False,
    strict: bool = False,
    work: Path | None = None,
    spill: Path | None = None,
) -> Report:
    """One walk through the layers, for a recipe that names the layers it leaves out; see
    front.compress, which is what everyone calls.

    work: the folder for what a later run goes on with; None: the hidden sibling of `out`.

    In a team of several processes each of them calls this; rank 0 has the folder and writes.
    """
    us, place = team(), find_device(device, kernels=True)
    local = Path(model).expanduser()  # the output is checked before a model is fetched from a hub
    fresh = restart or not (work or work_place(Path(out))).exists()  # else it may be of this run
    if us.first and fresh:
        check_output(Path(out), overwrite=overwrite, source=local if local.is_dir() else None)
    recipe = as_run(recipe, model, texts)
    settings = from_recipe(recipe)
    checkpoint = open_checkpoint(model, offline=offline)
    check_companions(checkpoint.folder)
    tell = on_event if on_event is not None and us.first else lambda event: None
    run = _Run(checkpoint, settings, recipe, Path(out), tell, place)
    run.report.strict = strict
    give_back(checkpoint, careful=run.needs.trains or recipe.max_ram is not None)
    with ExitStack() as stack:
        held = stack.enter_context(Work(Path(out), work) if us.first else Guest(Path(out), work))
        if settings.statistic is not None:
            run.cut(texts, held.inputs if held.records and not restart else None)
        run.made_of = same_for_all(identity(checkpoint, run.recipe, run.calibration, place))
        done = us.tell(held.begin(run.made_of, restart=restart) if us.first else None)
        if done is not None:  # killed behind the last rename
            restore_report(run.report, done["report"])
            if us.first:
                held.remove()
            run.report.judge()
            return run.report
        if us.first:
            check_output(Path(out), overwrite=overwrite, source=checkpoint.folder)
            held.overwrite = overwrite
        same_folder(held.root)
        scratch = stack.enter_context(spill_folder(held.scratch, spill))
        return run.go(held, scratch)


def as_run(recipe: Recipe, model: str | Path, texts: Any) -> Recipe:
    """The recipe with the model and the folder of texts that are really used."""
    used: dict[str, Any] = {"model": str(model)}
    if isinstance(texts, (str, Path)):
        used["calibration"] = recipe.calibration.model_copy(update={"path": str(texts)})
    return recipe.model_copy(update=used)


class _Run:
    """One compression on its way; holds what all layers share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        recipe: Recipe,
        out: Path,
        on_event: OnEvent,
        device: torch.device,
    ):
        self.source, self.settings, self.recipe = checkpoint, settings, recipe
        self.checkpoint = checkpoint.without(recipe.drop_layers)
        self.on_event, self.device = on_event, device
        self.architecture = checkpoint.architecture
        plan = make_plan(recipe, self.checkpoint, checkpoint.config.num_hidden_layers)
        self.needs = needs_of(recipe, plan, self.checkpoint)
        self.budget = Budget(self.checkpoint, recipe.max_ram_bytes, self.needs)
        self.calibration: Calibration | None = None
        self.replay: Replay | None = None
        self.made_of: dict[str, Any] = {}  # what decides the weights, see identity.py
        self.away = False  # activations wait in the host's memory, not on the device
        self.packing = Packing(recipe, plan, self.checkpoint)
        self.plan = self.packing.plan
        self.report = Report(settings.method, self.architecture.model_type, out, settings.bits)
        self.report.format, self.report.quality = self.packing.format, settings.quality
        self.report.dropped_layers = list(recipe.drop_layers)
        self.report.source_layers = self.checkpoint.source_layers
        self.beside = Beside(self.checkpoint, self.packing, self.report, device)

    def cut(self, texts: Any, before: Mapping[str, Any] | None) -> None:
        """Calibration windows, in as many parts as the recipe says, or the run that was stopped
        (before: what it was made of), or as there are processes.
        """
        whole = shared_calibration(texts, self.recipe, self.source)
        if self.device.type == "cuda":
            whole = replace(whole, chunk_tokens=CUDA_CHUNK_TOKENS)
        spec = self.recipe.calibration
        count = team().tell(spec.parts or parts_of(before) or team().world)
        check_parts(count, whole, spec.parts)
        self.calibration = whole.in_parts(count)
        if count > 1:
            spec = spec.model_copy(update={"parts": count})
            self.recipe = self.recipe.model_copy(update={"calibration": spec})

    def go(self, work: Work | Guest, scratch: Path) -> Report:
        keeper: Keeper | Follower
        if team().first:
            keeper = Keeper(
                work, self.report, self.packing, self.budget.shard_bytes,
                self.checkpoint.config.num_hidden_layers, self.on_event,
            )  # fmt: skip
        else:
            keeper = Follower(work, self.report, self.packing)
        keeper.find()
        pattern = irregular(self.source.config, self.checkpoint.source_layers)
        if pattern is not None:
            self._notice(pattern)
        planned = self._find_room(work)
        if self.packing.format != "dense":
            self.on_event(events.Planned(self.packing.format, planned))
        notices = glu.notices(self.recipe, self.plan, self.checkpoint)
        for message in [*notices, *self.packing.notices]:
            self._notice(message)
        if self.calibration is not None:
            self._prepare(scratch, going_on=keeper.first > 0)
        keeper.restore(self.replay)
        self.report.judge()  # of layers that a run without strict has kept
        writer = keeper.writer
        skeleton = build_skeleton(self.checkpoint.config, self.checkpoint.dtype)
        check_tied(self.checkpoint, skeleton)
        layers = Layers(self.checkpoint, self.plan, self.packing, self.report, self.on_event)
        with Ferry(self.device, behind=writer is not None and not team().alone) as way:
            if writer is None:
                pass
            elif keeper.first:
                keeper.tensors()
            elif self.architecture.embed in self.packing.ends:
                # The device rounds it, before the rest.
                self.beside.end(writer, self.architecture.embed)
            else:
                way.do(lambda: self.beside.end(writer, self.architecture.embed))
            weightless = skeleton.get_submodule(self.architecture.layers)
            layers.run(weightless, self.replay, way, writer, keeper)
        self.report.ranks = told_of_ranks(self.calibration)
        if team().first:
            self._finish(work, keeper)
        told = team().tell(dump_report(self.report) if team().first else None)
        if not team().first:
            restore_report(self.report, told)
        return self.report

    def _find_room(self, work: Work | Guest) -> int:
        """Decide where activations wait, and check that the disk has room. Returns the bytes that
        the output is expected to have.
        """
        tokens = self.calibration.own_tokens if self.calibration is not None else 0
        waiting = activation_bytes(self.checkpoint, tokens, self.needs)
        if self.device.type == "cuda":
            self.away = waits_on_host(
                self.checkpoint, tokens, self.device, self.needs, self.recipe.max_vram_bytes
            )
        self.report.spilled = (self.away or self.device.type == "cpu") and self.budget.spills(
            waiting
        )
        if self.report.spilled:
            self._notice(f"activations wait on disk, about {waiting / (1 << 30):.2f} GiB")
        planned = self.packing.predicted()
        every = self.calibration.tokens if self.calibration is not None else 0
        kept = most_bytes(self.checkpoint, every, self.needs, self.budget.shard_bytes, planned)
        if team().first:
            least = planned + kept + waiting * self.report.spilled - work.nbytes
            check_disk(work.root, max(0, least))
        return planned

    def _finish(self, work: Work, keeper: Keeper) -> None:
        """Write what is not in layers, and put the output in its place."""
        writer = keeper.writer
        self.beside.rest(writer)
        self.beside.end(writer, self.architecture.head)
        shards = writer.finish()
        self.report.predicted_bytes = self.packing.predicted()
        self.report.file_bytes = sum(path.stat().st_size for path in shards)
        place = {name: index for index, name in enumerate(self.plan)}
        self.report.modules.sort(key=lambda module: place[module.module])
        copy_companions(self.checkpoint.folder, work.model)
        quantization = self.packing.config()
        if quantization or self.recipe.drop_layers:
            write_config(self.checkpoint.folder, work.model, quantization, self._cut)
        _write_recipe(self.recipe, work.model)
        self.report.seconds = keeper.seconds
        self.report.fall_back_on_kernels(self.device)
        self.report.write(work.model)
        complete(work.model, "compress", self.made_of)
        work.publish({"report": dump_report(self.report)})
        if fell_back := self.report.fallbacks.event(len(self.report.modules)):
            self.on_event(fell_back)
        self.on_event(events.Saved(self.report.out.name, len(shards), writer.total_bytes))

    def _cut(self, raw: dict[str, Any]) -> dict[str, Any]:
        """config.json of the source for the layers that are written."""
        if not self.recipe.drop_layers:
            return raw
        return cut_json(raw, self.source.config, self.checkpoint.source_layers)

    def _prepare(self, scratch: Path, *, going_on: bool) -> None:
        """Warn, prove the replay, and record what every layer is called with. going_on: an earlier
        run has proved it, and layers of it are kept.
        """
        calibration, report = self.calibration, self.report
        report.tokens, report.window = calibration.tokens, calibration.ids.shape[1]
        report.tokens_per_language = calibration.tokens_per_language
        report.parts = calibration.parts.count
        report.languages = LanguageReport.of(calibration, self.recipe.calibration.weights)
        self.on_event(
            events.Calibrated(
                report.tokens, report.window, report.tokens_per_language, calibration.fertility
            )
        )
        columns = self._widest() if self.settings.statistic == "hessian" else 0
        for message in calibration.notices(columns):
            self._notice(message)
        if not going_on and team().first:
            self._prove()
        mixture = Mixture(calibration, self.recipe.calibration.weights, self.device)
        left_out = LeftOut(calibration, report)
        stores = (self._store(scratch), self._store(scratch))
        self.replay = Replay(calibration, *stores, mixture, left_out)
        if self.needs.twin:
            self.replay.dense = (self._store(scratch), self._store(scratch))
        self._record(going_on=going_on)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the embedding was large, and no layer needs such blocks

    def _prove(self) -> None:
        proof = prove(
            self.checkpoint,
            self.calibration.ids[:PROOF_WINDOWS],
            self.device,
            whole=self.budget.proves_whole,
        )
        self.report.proof = proof
        self.on_event(events.Proved(proof.kind, proof.layers, proof.max_abs_diff, proof.exact))
        if proof.kind != "whole":
            depth = self.checkpoint.config.num_hidden_layers
            self._notice(
                f"the replay was proved over {proof.layers} of {depth} layers: the whole model "
                "does not fit in memory"
            )

    def _store(self, scratch: Path) -> Store:
        spilled = self.report.spilled
        return Store(scratch if spilled else None, host=self.away and not spilled)

    def _record(self, *, going_on: bool) -> None:
        """What every layer is called with, and the first hidden states of all chunks (going_on:
        those of a later layer are kept).
        """
        ends = Ends(
            build_skeleton(self.checkpoint.config, self.checkpoint.dtype),
            self.checkpoint,
            self.device,
            shared=True,
        )
        if self.architecture.embed in self.packing.ends:  # the layers see the embedding as rounded
            embed = ends.model.get_submodule(self.architecture.embed)
            W = embed.weight.data
            rounded = self.packing.embedding(self.architecture.embed, self.device, W)
            embed.weight.data = rounded.dense(self.checkpoint.dtype).to(self.device)
        if self.needs.trains:
            few = self.calibration.ids[: self.replay.batch]
            self.replay.short = ends.inputs(few.to(self.device))[1]
        for chunk, ids in enumerate(self.calibration.chunks()):
            hidden, calls = ends.inputs(ids.to(self.device))
            self.replay.calls.add(calls)
            streams = [] if going_on else [self.replay.hidden, *(self.replay.dense or ())[:1]]
            for store in streams:
                store.put(("hidden", chunk), hidden)

    def _widest(self) -> int:
        """Columns of the widest Linear of a layer."""
        prefix = f"{self.architecture.layers}.0"
        names = (f"{prefix}.{name}.weight" for name in self.architecture.linears())
        return max(self.checkpoint.entries[name].shape[1] for name in names)

    def _notice(self, message: str) -> None:
        self.report.notices.append(message)
        self.on_event(events.Notice(message))


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        f"{MARKER}, version {__version__}\n{recipe.to_yaml()}", encoding="utf-8"
    )
