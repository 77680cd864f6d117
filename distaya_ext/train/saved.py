"""What training keeps on disk: checkpoints that a killed run goes on from, and the best so far.

A checkpoint is a folder checkpoint-00000120 with what learns (parameters.safetensors), the
optimizer's state (optimizer.safetensors), the random generators (generators.safetensors), the
metrics up to there and state.json, which is written last and says how large the others are. It is
made under another name and renamed when all of it is on the disk. The weights that do not learn are
in none of them: they are the model's.

Of several ranks the first one alone writes and reads here, and the others have its tensors from it;
what is sharded is gathered. So a folder looks the same whatever ran, and any number of ranks can go
on from it. Functions that tensors are given to are called by all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..durable import sync, write_whole
from ..errors import InputError
from ..ranks import by_first, team
from .sharding import gathered, shared_out

_PREFIX, _PARTIAL = "checkpoint-", ".partial-"
_KEPT = 2
_BEST = "best/parameters.safetensors"
METRICS = "metrics.jsonl"


def save_checkpoint(
    work: Path,
    step: int,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write the checkpoint of `step`, and remove all but the newest two. state is plain JSON."""
    plain, moments = _plain(parameters), _moments(parameters, optimizer)
    if team().first:
        _write(work, step, plain, moments, state)


def _write(
    work: Path,
    step: int,
    parameters: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> None:
    partial, final = work / f"{_PARTIAL}{step:08d}", work / f"{_PREFIX}{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(parameters, partial / "parameters.safetensors")
    save_file(moments, partial / "optimizer.safetensors")
    tensors, rest = get_generators()
    save_file(tensors, partial / "generators.safetensors")
    if (work / METRICS).is_file():
        shutil.copyfile(work / METRICS, partial / METRICS)
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    held = {"step": step, "files": files, "generators": rest, **state}
    text = json.dumps(held, indent=1, ensure_ascii=False)
    (partial / "state.json").write_text(text, encoding="utf-8")
    for path in partial.iterdir():
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync(work)
    for old in _folders(work)[:-_KEPT]:
        shutil.rmtree(old)


def newest(work: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its state. What a kill left half-written is removed."""
    for partial in work.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
    for folder in reversed(_folders(work)):
        state = _state(folder)
        if state is not None:
            return folder, state
        shutil.rmtree(folder)
    return None


def restore(
    folder: Path,
    state: Mapping[str, Any],
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put a checkpoint's parameters, moments and random generators back."""
    load_parameters(folder / "parameters.safetensors", parameters)
    file = folder / "optimizer.safetensors"
    names = by_first(lambda: list(load_file(file)))
    found = load_file(file) if team().first else {}
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key in names:
        name, _, part = key.rpartition(":")
        parameter = parameters[name]
        if part == "step":
            like = torch.empty((), dtype=torch.float32)
            moments.setdefault(name, {})[part] = _given(found.get(key), like)
        else:
            whole = _given(found.get(key), parameter)
            moments.setdefault(name, {})[part] = shared_out(whole, parameter)
    for name, parameter in parameters.items():
        if name in moments:
            optimizer.state[parameter] = moments[name]
    if team().first:  # the others draw what seed_all says
        set_generators(load_file(folder / "generators.safetensors"), state["generators"])


def save_best(work: Path, parameters: Mapping[str, torch.Tensor], step: int, loss: float) -> None:
    """Replace the best parameters, in one rename."""
    plain = _plain(parameters)
    if team().first:
        target = work / _BEST
        target.parent.mkdir(exist_ok=True)
        # One entry: the library writes several in an order of chance.
        about = {"best": json.dumps({"step": step, "loss": loss})}
        write_whole(target, lambda path: save_file(plain, path, about))


def load_best(work: Path, parameters: Mapping[str, torch.Tensor]) -> tuple[int, float] | None:
    """Put the best parameters back; (step, held-out loss) of them, None where there are none."""
    path = work / _BEST
    if not by_first(path.is_file):
        return None
    about = load_parameters(path, parameters)
    found = json.loads(about["best"]) if "best" in about else about  # older runs had two entries
    return int(found["step"]), float(found["loss"])


def load_parameters(path: Path, parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Copy a file's tensors into the parameters of their names; returns the file's metadata.

    InputError when the file cannot be read or holds others.
    """

    def opened() -> dict[str, str]:
        with _readable(path), safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(parameters):
                raise InputError(
                    f"{path} holds {len(names)} trained tensors, {len(names - set(parameters))} of "
                    f"which are none of the {len(parameters)} that learn now"
                )
            return dict(file.metadata() or {})

    about = by_first(opened)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(_readable(path))
        first = team().first
        file = stack.enter_context(safe_open(path, framework="pt")) if first else None
        for name, parameter in parameters.items():
            whole = _given(None if file is None else file.get_tensor(name), parameter)
            parameter.copy_(shared_out(whole, parameter))
    return about


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _given(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A tensor of rank 0 on every rank, on the CPU; like: its shape and dtype."""
    if tensor is None:
        tensor = torch.empty(like.shape, dtype=like.dtype)
    elif tensor.shape != like.shape:
        raise RuntimeError(f"it has {list(tensor.shape)} where {list(like.shape)} learns")
    return team().broadcast_(tensor.contiguous()).view(like.shape)


def _plain(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return _copied({name: p.detach() for name, p in parameters.items()}, copy=True)


def _moments(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as "name:exp_avg" and so on."""
    held = {
        f"{name}:{part}": tensor.detach()
        for name, parameter in parameters.items()
        for part, tensor in optimizer.state.get(parameter, {}).items()
    }
    return _copied(held, copy=False)


def _copied(tensors: Mapping[str, torch.Tensor], copy: bool) -> dict[str, torch.Tensor]:
    """Whole, on the CPU of rank 0; the others keep none."""
    found = {}
    for name, tensor in tensors.items():
        whole = gathered(tensor)
        if team().first:
            found[name] = whole.to("cpu", copy=copy).contiguous()
    return found


def get_generators() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """States of the random generators of torch, numpy and Python: tensors, and the rest."""
    kind, keys, *rest = np.random.get_state()
    tensors = {
        "torch": torch.random.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if torch.cuda.is_available():
        for number, each in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{number}"] = each
    return tensors, {"numpy": [kind, *rest], "python": random.getstate()}


def set_generators(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Put the states of the random generators back."""
    torch.random.set_rng_state(tensors["torch"])
    kind, *numbers = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *numbers))
    version, inner, gauss = rest["python"]
    random.setstate((version, tuple(inner), gauss))
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda.{number}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{number}"], number)


def _folders(work: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = (p for p in work.glob(f"{_PREFIX}*") if p.is_dir())
    return sorted(p for p in found if p.name.removeprefix(_PREFIX).isdecimal())


def _state(folder: Path) -> dict[str, Any] | None:
    """state.json of a checkpoint all of whose files are as long as it says; None otherwise."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in state["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if sizes == state["files"] else None
