"""Task files of a user's folder: plain YAML whose data lies beside it.

A file may hold a whole task, or only `task`, `dataset_path` and `dataset_kwargs` (and whatever else
differs): then it is laid over the harness's own task of that name, which so runs on local data.
Nothing in such a folder is run: no !function, no class, no metric that is not the harness's own,
and templates run in Jinja's sandbox.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, UsageError, one_line

_READERS = ("json", "csv", "parquet", "text", "arrow")  # of the datasets package: data, no code
_MOST = 1 << 20  # bytes of a task file
_CODE = ("class", "custom_dataset", "unsafe_code")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_WHOLE = ("doc_to_text", "output_type")  # who says this does not lean on a task of the harness


class _Loader(yaml.SafeLoader):
    """Plain YAML; a tag that would run something is an error with the tag in it."""


def read_folder(folder: Path, cache: str) -> dict[str, dict[str, Any]]:
    """Task name -> configuration of every task file in a folder and those below it.

    Data files are resolved beside their YAML file; `cache` is where datasets keeps what it makes of
    them. InputError names the file for what cannot be used.
    """
    if not folder.is_dir():
        raise UsageError(f"--task-path {folder} is no folder")
    found: dict[str, dict[str, Any]] = {}
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        config = _read(path, folder.resolve())
        name = config.get("task")
        if name is None:
            continue  # what others include
        if not isinstance(name, str):
            raise InputError(f"task file {path}: task must be a name; groups are not read here")
        if name in found:
            raise InputError(f"task file {path}: task {name} is in another file of {folder}, too")
        found[name] = _checked(config, path, cache)
    if not found:
        raise InputError(f"--task-path {folder} holds no .yaml file with a task")
    return found


def lay_over(harness: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The harness's configuration with a lean one over it, without the splits that the data lacks:
    who has no validation split asks what is in the test split.
    """
    files = config["dataset_kwargs"]["data_files"]
    splits = set(files) if isinstance(files, dict) else {"train"}
    lacking = {key: None for key in _SPLITS if harness.get(key) not in splits}
    return harness | lacking | config


def leans_on_harness(config: dict[str, Any]) -> bool:
    """Whether a configuration only says what differs from the harness's task of its name."""
    return not any(key in config for key in _WHOLE)


def _read(path: Path, root: Path, depth: int = 0) -> dict[str, Any]:
    """The mapping of a file over those of the files it includes."""
    if not path.resolve().is_relative_to(root):
        raise InputError(f"task file {path} lies outside the task folder")
    try:
        if path.stat().st_size > _MOST:
            raise InputError(f"task file {path} is larger than {_MOST} bytes")
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"task file {path} cannot be read: {one_line(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if "!function" in str(error):
            raise InputError(
                f"task file {path} runs Python (!function), which is never done: write a template, "
                "or name only what differs from lm-evaluation-harness's own task"
            ) from None
        raise InputError(f"task file {path} is not plain YAML: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise InputError(f"task file {path} must be a mapping, not {type(config).__name__}")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        if depth > 8:
            raise InputError(f"task file {path} includes others more than 8 deep")
        merged |= _read(path.parent / str(name), root, depth + 1)
    return merged | config


def _checked(config: dict[str, Any], path: Path, cache: str) -> dict[str, Any]:
    """With data files resolved. InputError for what would run code or reach out."""
    for key in _CODE:
        if config.get(key):
            raise InputError(f"task file {path}: {key} would run code, which is never done")
    _check_metrics(config, path)
    reader = config.get("dataset_path")
    if reader not in _READERS:
        raise InputError(
            f"task file {path}: dataset_path {reader!r} must be one of {', '.join(_READERS)}"
        )
    said = config.get("dataset_kwargs")
    kwargs = dict(said) if isinstance(said, dict) else {}
    kwargs.pop("trust_remote_code", None)
    if "data_files" not in kwargs or set(kwargs) - {"data_files", "field"}:
        raise InputError(
            f"task file {path}: dataset_kwargs must hold data_files, and field at most beside it"
        )
    kwargs |= {"data_files": _files(kwargs["data_files"], path), "cache_dir": cache}
    return {"dataset_name": None, **config, "dataset_kwargs": kwargs}


def _check_metrics(config: dict[str, Any], path: Path) -> None:
    known = _metrics()
    for each in config.get("metric_list") or []:
        name = each.get("metric") if isinstance(each, dict) else None
        if name not in known:
            raise InputError(
                f"task file {path}: metric {name!r} is not one of lm-evaluation-harness: "
                f"{', '.join(sorted(known))}"
            )


@functools.cache
def _metrics() -> frozenset[str]:
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    return frozenset(metric_registry.keys())


def _files(said: Any, path: Path) -> Any:
    """The same structure with every name resolved beside the YAML file."""
    if isinstance(said, dict):
        return {split: _files(names, path) for split, names in said.items()}
    if isinstance(said, list):
        return [_files(name, path) for name in said]
    file = path.parent / str(said)
    if not file.is_file():
        raise InputError(f"task file {path}: there is no data file {said}")
    return str(file.resolve())


def nearby(names: Sequence[str], folder: Path) -> Iterator[Path]:
    """Folders of the harness where tasks of these names are likely to be: xcopa for xcopa_et.

    Reading all of its ten thousand files takes seconds.
    """
    for name in names:
        parts = name.split("_")
        for count in range(1, len(parts) + 1):
            place = folder / "_".join(parts[:count])
            if place.is_dir():
                yield place
