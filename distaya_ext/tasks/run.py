"""run_tasks(): questions of lm-evaluation-harness to one or two of our models."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DistayaError, InputError, UsageError, one_line
from ..evaluate.load import Loaded, load
from ..ranks import team
from .local import lay_over, leans_on_harness, nearby, read_folder
from .result import TaskResults, rows_of

_LOGIT_BYTES = 256 << 20  # of a batch: float32 logits of all its tokens
_TYPICAL = 256  # tokens of a question
_MOST_ROWS = 16


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    against: str | Path | None = None,
    task_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    offline: bool = False,
    exact: bool = False,
    on_note: Callable[[str], Any] = lambda text: None,
) -> TaskResults:
    """Run tasks by name on a model, and on `against` after it (one is in memory at a time).

    task_path  folder of task files with their data beside them, see tasks.local
    limit      questions of each task at most, num_fewshot examples before each (None: the task's)

    Models are loaded by evaluate.load, so packed ones run packed; no remote code is ever run.
    UsageError without the harness, for a task that there is not and under ranks, InputError for
    data or a model that cannot be used.
    """
    if not team().alone:
        raise UsageError(
            f"tasks of lm-evaluation-harness run in one process, not in {team().world}; start "
            "distaya without torchrun"
        )
    start = time.perf_counter()
    harness = _harness()
    names = [name.strip() for name in tasks if name.strip()]
    if not names:
        raise UsageError("name a task: --tasks xcopa_et,xcopa_sw")
    running = {"dtype": dtype, "device": device, "offline": offline, "exact": exact}
    with _quietly(offline), tempfile.TemporaryDirectory(prefix="distaya-tasks-") as cache:
        source = _Source(names, None if task_path is None else Path(task_path), cache)
        found = []
        for each in [model] if against is None else [model, against]:
            asked = source.load()  # anew: tasks keep what they were answered
            loaded = load(each, **running)
            on_note(f"{each}: {', '.join(asked['tasks'])}")
            found.append(_answers(loaded, asked, limit, num_fewshot))
            del loaded
    rows = rows_of(found[0], found[1] if against is not None else None)
    if not rows:
        raise InputError(f"{', '.join(names)} gave no number")
    base = None if against is None else str(against)
    return TaskResults(str(model), base, rows, harness, time.perf_counter() - start)


def wrap(loaded: Loaded) -> Any:
    """A loaded model as the harness's HFLM, packed weights as they are, with our tokenizer."""
    from lm_eval.models.huggingface import HFLM

    row = 4 * _TYPICAL * loaded.vocabulary
    return HFLM(
        pretrained=loaded.model,
        tokenizer=copy.deepcopy(loaded.tokenizer),  # it may be given a mark for padding
        backend="causal",
        batch_size=max(1, min(_MOST_ROWS, _LOGIT_BYTES // row)),
        max_length=getattr(loaded.model.config, "max_position_embeddings", None),
        trust_remote_code=False,
    )


class _Source:
    """Where tasks come from: the folder of the user, then the harness."""

    def __init__(self, names: list[str], folder: Path | None, cache: str):
        from lm_eval.tasks import TaskManager

        self.names = names
        self.local = {} if folder is None else read_folder(folder, cache)
        own = [n for n in names if n in self.local and not leans_on_harness(self.local[n])]
        wanted = [name for name in names if name not in own]
        self.manager = TaskManager(include_defaults=False, include_path=_close(wanted))
        if not self._knows(wanted):
            self.manager = TaskManager(include_defaults=True)
        for name in wanted:
            if name not in self.manager.all_tasks:
                raise UsageError(self._unknown(name))

    def load(self) -> dict[str, Any]:
        """The tasks with their data."""
        try:
            return self.manager.load([self._spec(name) for name in self.names])
        except Exception as error:  # of any library that reads data
            raise _told("cannot be loaded", self.names, error) from error

    def _spec(self, name: str) -> str | dict[str, Any]:
        if name not in self.local:
            return name
        config = copy.deepcopy(self.local[name])
        if not leans_on_harness(config):
            return config
        from lm_eval.tasks._yaml_loader import load_yaml

        return lay_over(load_yaml(self.manager.task_index[name].yaml_path), config)

    def _knows(self, names: list[str]) -> bool:
        return all(name in self.manager.all_tasks for name in names)

    def _unknown(self, name: str) -> str:
        known = [*self.local, *self.manager.all_tasks]
        close = difflib.get_close_matches(name, known, 3, 0.6)
        hint = f"; there is {', '.join(close)}" if close else ""
        if name in self.local:
            return f"the file of task {name} has no doc_to_text, and no such task is in the harness"
        return f"there is no task {name!r}{hint}"


def _close(names: list[str]) -> list[Path]:
    import lm_eval.tasks

    return list(dict.fromkeys(nearby(names, Path(lm_eval.tasks.__file__).parent)))


def _answers(
    loaded: Loaded, asked: dict[str, Any], limit: int | None, shots: int | None
) -> dict[str, Any]:
    from lm_eval import evaluate

    for task in asked["tasks"].values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=1234)  # the harness's own
    lm = wrap(loaded)
    try:
        # Its own intervals take minutes; ours are made of the answers to each question.
        return evaluate(lm, asked, limit=limit, bootstrap_iters=0, log_samples=True)
    except (MemoryError, DistayaError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise _told("cannot be run", list(asked["tasks"]), error) from error


def _told(what: str, names: Sequence[str], error: Exception) -> InputError:
    cause = error.__cause__ or error.__context__ or error
    said = one_line(error) or type(error).__name__
    more = f" ({one_line(cause, 150)})" if cause is not error and str(cause) not in said else ""
    return InputError(f"{', '.join(names)} {what}: {type(error).__name__}: {said}{more}")


def _harness() -> str:
    """The version of lm-evaluation-harness; UsageError where it, or what it needs, is absent."""
    try:
        import accelerate  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--tasks needs lm-evaluation-harness ({error.name} is not here): "
            "pip install 'distaya-ext[tasks]'"
        ) from None
    from importlib.metadata import version

    return version("lm_eval")


@contextlib.contextmanager
def _quietly(offline: bool) -> Iterator[None]:
    """Only what matters is logged, templates run in a sandbox, and offline nothing is asked for."""
    import datasets
    import lm_eval.utils
    from huggingface_hub import constants
    from jinja2.sandbox import SandboxedEnvironment

    from ..checkpoint.whole import quiet_transformers

    free = lm_eval.utils.env
    caged = SandboxedEnvironment(undefined=free.undefined, keep_trailing_newline=True)
    caged.filters = free.filters
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        logger = logging.getLogger("lm_eval")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        changes: list[tuple[Any, str, Any]] = [(lm_eval.utils, "env", caged)]
        if offline:
            changes += [(place, "HF_HUB_OFFLINE", True) for place in (constants, datasets.config)]
        for place, name, value in changes:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield
