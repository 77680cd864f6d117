"""How tests run fuzz targets: prepared once, under hypothesis, and on the kept corpus."""

from collections.abc import Callable
from pathlib import Path

from fuzzing import Target, kept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def prepared_once(targets: dict[str, Target], folder: Callable[[str], Path | None]):
    """name -> its target, prepared in folder(name) when it is first asked for."""
    made: dict[str, Target] = {}

    def prepare(name: str) -> Target:
        if name not in made:
            made[name] = targets[name].prepare(folder(name))
        return made[name]

    return prepare


def examine(target: Target, examples: int, most_bytes: int) -> None:
    """Run it under hypothesis, the same inputs every time."""
    check = settings(
        max_examples=examples // target.slow,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    check(given(st.binary(max_size=most_bytes))(target.run))()


def replay(target: Target) -> None:
    """Run the kept corpus: inputs that reached every line coverage found, and those that found a
    defect.
    """
    inputs = kept(target.name)
    assert inputs
    for data in inputs:
        target.run(data)
