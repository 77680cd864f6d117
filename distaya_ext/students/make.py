"""make_student(): a shallower or narrower model that starts with its teacher's weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    MARKER,
    Checkpoint,
    ShardWriter,
    Staging,
    check_companions,
    check_output,
    copy_companions,
    open_checkpoint,
    write_config,
)
from ..compress.budget import check_disk
from ..compress.calibrate import CUDA_CHUNK_TOKENS, Calibration
from ..device import find_device
from ..errors import InputError, UsageError
from ..finished import complete
from ..models.skeleton import build_skeleton
from ..resume.identity import model_identity
from ..texts import check_window, read_texts, windows
from ..tokenizer import check_rows, load_tokenizer
from .importance import (
    Fit,
    Importance,
    OnLayer,
    best,
    by_activation,
    by_chance,
    by_magnitude,
    fit_norms,
)
from .layers import choose_layers, how_layers
from .narrow import Kept, Knife, narrowed
from .shape import Shape, config_json, own_shape, plan, skeleton

BY = ("activation", "magnitude", "random")


@dataclass(frozen=True)
class Made:
    """What make_student() wrote. channels: the teacher's channels that stay (None: all), in the
    student's order; norms: factor and error of every rescaled norm.
    """

    out: Path
    teacher: str
    shape: Shape
    layers_by: str
    width_by: str | None
    channels: list[int] | None
    norms: dict[str, Fit] = field(repr=False)
    parameters: int
    bytes: int
    tokens: int
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "teacher": self.teacher,
            **self.shape.to_dict(),
            "layers_by": self.layers_by,
            "width_by": self.width_by,
            "channels": self.channels,
            "norms": {name: vars(fit) for name, fit in self.norms.items()},
            "parameters": self.parameters,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
        }


def make_student(
    teacher: str | Path,
    out: str | Path,
    *,
    layers: int | Sequence[int] | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    texts: Any = None,
    by: str = "activation",
    layers_by: str | None = None,
    tokens: int = 16384,
    window: int = 256,
    seed: int = 0,
    device: str = "cpu",
    offline: bool = False,
    overwrite: bool = False,
    on_step: Callable[[int, int, str], None] | None = None,
) -> Made:
    """Write a plain Hugging Face folder whose weights are those of the teacher that matter most.

    teacher        local dense folder or hub id, of a family in the architecture table
    layers         a list of layers that stay, or how many
    hidden         channels of the residual stream that stay; each norm over them is rescaled by
                   least squares (importance.fit_norms), and the error left is in the result
    intermediate   MLP neurons that stay in each layer
    heads          query heads that stay in each layer, whole groups of those that share a key
    texts          folder of <lang>.txt, .jsonl or .parquet, a mapping of documents per language, or
                   windows as texts.windows returns them: what activations are looked at
    by             what decides about width: activation (Minitron, arXiv 2407.14679; needs texts),
                   magnitude of weights, or random
    layers_by      which layers stay when only their number is said: those that bi, kl, ppl, angular
                   or l2 of distaya_ext.influence leave, or spread: evenly, the first and the last
                   among them. None: kl where there are texts (a walk for each layer that goes, and
                   each walk with as many streams as layers), spread where there are none

    on_step        is called with layers done, layers in all, and what is looked at

    Layers go first, and the width of what is left is judged without them. Reads tensor by tensor;
    one decoder layer and the embedding are in memory at a time, `out` appears when it is complete.
    InputError and UsageError in one sentence.
    """
    start = time.perf_counter()
    if by not in BY:
        raise UsageError(f"by {by!r} is none of {', '.join(BY)}")
    place, local = find_device(device), Path(teacher).expanduser()
    check_output(Path(out), overwrite=overwrite, source=local if local.is_dir() else None)
    checkpoint = open_checkpoint(teacher, offline=offline)
    check_companions(checkpoint.folder)
    most = checkpoint.config.num_hidden_layers
    counted = isinstance(layers, int)
    if counted and not 1 <= layers <= most:
        raise UsageError(f"{layers} layers cannot be cut out of the teacher's {most}")
    first = list(range(layers)) if counted else layers  # any as many, to see whether they fit
    shape = plan(checkpoint, layers=first, hidden=hidden, intermediate=intermediate, heads=heads)
    own = own_shape(checkpoint)
    if shape == own:
        raise UsageError(
            "the student would be its teacher; give layers, hidden, intermediate or heads"
        )
    width = (shape.hidden, shape.intermediate, shape.heads)
    narrower = width != (own.hidden, own.intermediate, own.heads)
    needs_texts = narrower and by == "activation"
    layers_by, needed = how_layers(layers_by, counted and layers < most, texts)
    if not layers_by:
        layers_by = "named" if len(shape.layers) < most else "all"
    if texts is None and (needs_texts or needed):
        raise UsageError(
            "which layers, channels, neurons and heads matter is seen on texts and none are given; "
            "by='magnitude' and layers_by='spread' need none"
        )
    calibration = None
    if texts is not None and (narrower or needed):
        calibration = _calibration(texts, checkpoint, tokens, window, seed, place)
    if counted and layers < most:
        left = choose_layers(checkpoint, layers, layers_by, calibration, device)
        shape = replace(shape, layers=tuple(left))
    cut = checkpoint.without([i for i in own.layers if i not in shape.layers])
    kept, fits = _decide(cut, shape, by if narrower else None, calibration, seed, place, on_step)
    with Staging(Path(out), overwrite=overwrite, source=checkpoint.folder) as staging:
        parameters, size = _write(checkpoint, cut, shape, kept, fits, staging)
        made = Made(
            out=Path(out),
            teacher=str(teacher),
            shape=shape,
            layers_by=layers_by,
            width_by=by if narrower else None,
            channels=None if kept.channels is None else kept.channels.tolist(),
            norms=fits,
            parameters=parameters,
            bytes=size,
            tokens=0 if calibration is None else calibration.tokens,
            seed=seed,
            seconds=time.perf_counter() - start,
        )
        _note(made, staging.model)
        complete(staging.model, "shrink", {"model": model_identity(checkpoint.folder)})
        staging.publish()
    return made


def _calibration(
    texts: Any,
    checkpoint: Checkpoint,
    tokens: int,
    window: int,
    seed: int,
    place: torch.device,
) -> Calibration:
    """Windows [windows, length] of the texts in the teacher's tokens."""
    if not hasattr(texts, "ids"):
        check_window(window, checkpoint.config)
        documents = texts if isinstance(texts, Mapping) else read_texts(texts)
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
        texts = windows(documents, tokenizer, tokens=tokens, window=window, seed=seed)
    check_rows(int(texts.ids.max()), checkpoint.config.vocab_size, "the windows use token")
    chunk = CUDA_CHUNK_TOKENS if place.type == "cuda" else None
    return Calibration(texts.ids, list(texts.languages), chunk_tokens=chunk)


def _decide(
    checkpoint: Checkpoint,
    shape: Shape,
    by: str | None,
    calibration: Calibration | None,
    seed: int,
    place: torch.device,
    on_step: Callable[[int, int, str], None] | None,
) -> tuple[Kept, dict[str, Fit]]:
    """What stays of the width of a checkpoint that has the student's layers already."""

    def tell(what: str) -> OnLayer | None:
        return None if on_step is None else lambda done, total: on_step(done, total, what)

    own, count = own_shape(checkpoint), len(shape.layers)
    if by is None:
        return Kept(None, [None] * count, [None] * count), {}
    if by == "activation":
        scores = by_activation(checkpoint, calibration, place, tell("activations"))
    elif by == "magnitude":
        scores = by_magnitude(checkpoint)
    else:
        scores = by_chance(checkpoint, seed)
    kept = _kept(scores, own, shape)
    if kept.channels is None or calibration is None:
        return kept, {}
    cut = narrowed(kept.channels)
    fits = fit_norms(checkpoint, calibration, kept.channels, place, cut, tell("norms"))
    return kept, fits


def _kept(scores: Importance, own: Shape, shape: Shape) -> Kept:
    def each(parts: list[torch.Tensor], count: int, most: int) -> list[torch.Tensor | None]:
        return [None if count == most else best(part, count) for part in parts]

    return Kept(
        channels=None if shape.hidden == own.hidden else best(scores.channels, shape.hidden),
        neurons=each(scores.neurons, shape.intermediate, own.intermediate),
        groups=each(scores.groups, shape.kv_heads, own.kv_heads),
    )


def _write(
    teacher: Checkpoint,
    checkpoint: Checkpoint,
    shape: Shape,
    kept: Kept,
    fits: dict[str, Fit],
    staging: Staging,
) -> tuple[int, int]:
    """Weights, config.json and what stands beside it; numbers of parameters and bytes."""
    student, embed = skeleton(teacher, shape), checkpoint.architecture.embed
    before = build_skeleton(checkpoint.config, checkpoint.dtype).get_submodule(embed)
    after = student.get_submodule(embed)
    factor = _embed_scale(before) / _embed_scale(after)
    knife = Knife(checkpoint, shape, kept, fits, factor)
    expected = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in student.parameters())
    check_disk(staging.root, 4 * parameters)
    writer, head = ShardWriter(staging.model), f"{checkpoint.architecture.head}.weight"
    for name in checkpoint.entries:
        if name == head and checkpoint.tied:
            continue  # the embedding, once more
        (tensor,) = checkpoint.read([name]).values()
        tensor = knife.cut(name, tensor)
        if tuple(tensor.shape) != expected[name]:
            raise InputError(
                f"{name} was cut to {list(tensor.shape)} and the student has "
                f"{list(expected[name])}; the architecture table is wrong"
            )
        writer.add(name, tensor)
    writer.finish()
    copy_companions(teacher.folder, staging.model)
    write_config(teacher.folder, staging.model, None, lambda raw: config_json(teacher, shape, raw))
    return parameters, writer.total_bytes


def _embed_scale(embedding: torch.nn.Module) -> float:
    """What the model multiplies its embedding by because of its width (Gemma)."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def _note(made: Made, folder: Path) -> None:
    """student.json says where the weights come from; recipe.yaml makes the folder one of ours."""
    from .. import __version__

    facts = {key: value for key, value in made.to_dict().items() if key not in ("out", "seconds")}
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (folder / "student.json").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"{MARKER}, version {__version__}\n# Not one for compress: student.json says how this "
        "student was cut out of its teacher.\n",
        encoding="utf-8",
    )
