"""Evaluation by several ranks: the same figures, bit by bit, as by one process."""

import contextlib
import io
import json
import os
from dataclasses import asdict, replace
from importlib import import_module

import numpy as np
import pytest
from ranked import Ranks, run_ranks
from speaking import SENTENCES, save_model, save_texts, tokenizer

from distaya_ext.errors import DistayaError, UsageError
from distaya_ext.evaluate import cut_windows, evaluate, evaluate_loaded, load
from distaya_ext.ranks import Team, jobs_of
from distaya_ext.ranks.team import acting
from distaya_ext.tasks.run import run_tasks

_ROOM = 4 * 300 * 40  # tokens 40 at once: several batches, the last one smaller


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    texts = save_texts(root / "texts", repeat=2)
    longer = "\n".join(SENTENCES["en"] * 7) + "\n"
    (texts / "en.txt").write_text(longer, encoding="utf-8")  # uneven languages
    lines = save_texts(root / "lines", repeat=2)
    return save_model(root / "a", seed=1), save_model(root / "b", seed=2), texts, lines


def _batched(room):
    import_module("distaya_ext.evaluate.score")._LOGIT_BYTES = room
    import_module("distaya_ext.evaluate.continuations")._ROWS = 2


def _figures(found):
    """Everything but the seconds, which must be the same on every rank all the same."""
    told = asdict(found)
    seconds = [told.pop("seconds")]
    if told["written"] is not None:
        seconds.append(told["written"].pop("seconds"))
    return told, seconds


def _evaluated(model, base, texts, lines, room):
    _batched(room)
    seen = []
    more = {"new_tokens": 5, "on_progress": lambda *args: seen.append(args)}
    found = [
        evaluate(model, texts, against=base, window=16, continuations=3, **more),
        evaluate(model, lines, against=base, per_line=True, continuations=0, **more),
        evaluate(model, texts, window=9, tokens=100, continuations=1, **more),
    ]
    return [_figures(one) for one in found], seen


@pytest.fixture(scope="module")
def alone(folders):
    """What one process finds."""
    (found,) = run_ranks(1, _evaluated, *folders, _ROOM)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_figures_of_one_process(world, folders, alone):
    expected, seen = alone
    found = run_ranks(world, _evaluated, *folders, _ROOM)
    for one, _ in found:
        for (told, _), (want, _) in zip(one, expected, strict=True):
            assert told == want  # floats and texts alike
    assert all(want["samples"] == [] or want["written"]["per_language"] for want, _ in expected)
    assert [seconds for _, seconds in found[0][0]] == [seconds for _, seconds in found[-1][0]]
    # Rank 0 alone tells of progress, over everything.
    told = [events for _, events in found]
    assert not any(told[1:]) and len(told[0]) < len(seen)
    ends = [(done, total) for done, total, _ in told[0] if done == total]
    assert ends == [(done, total) for done, total, _ in seen if done == total]


def _one_batch(model, base, count):
    """Fewer batches than ranks: one window in one language."""
    loaded, other = load(model), load(base)
    samples = cut_windows({"ja": SENTENCES["ja"]}, tokenizer(), window=8)
    samples = [replace(s, rows=s.rows[:count]) for s in samples]
    both = evaluate_loaded([loaded, other], samples, window=8)
    return [_figures(one)[0] for one in [*both, *evaluate_loaded([other], samples, base=loaded)]]


def test_ranks_without_a_batch_have_the_figures_too(folders):
    (expected,) = run_ranks(1, _one_batch, *folders[:2], 1)
    for found in run_ranks(3, _one_batch, *folders[:2], 1):
        assert found == expected


def _with_a_bad_row(model):
    _batched(1)  # every row by itself
    loaded = load(model)
    loaded.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out.masked_fill((args[0] == 3)[..., None], float("nan"))
    )
    samples = cut_windows(SENTENCES, tokenizer(), window=8)
    assert not any(3 in row for s in samples for row in s.rows)  # "!", of which there is none
    samples[1].rows[2][3] = 3
    evaluate_loaded([loaded], samples, window=8)


def test_a_row_that_overflows_is_told_of_by_the_rank_that_has_it(folders):
    ((_, (kind, expected, _)),) = Ranks(1, _with_a_bad_row, folders[0]).ends()
    assert kind == "InputError" and "sample 3 of language es" in expected
    ends = [what for _, what in Ranks(3, _with_a_bad_row, folders[0]).ends()]
    assert sorted(what[0] for what in ends) == ["InputError", "LostError", "LostError"]
    assert expected in [what[1] for what in ends]


def _bad_texts(model, texts):
    return evaluate(model, texts, window=16)


def test_texts_that_rank_0_cannot_read_are_told_once(folders, tmp_path):
    ends = Ranks(2, _bad_texts, folders[0], tmp_path / "none").ends()
    assert ends[0][1][0] == "InputError" and "none" in ends[0][1][1]
    assert ends[1][1][0] == "LostError"


def test_work_is_dealt_out_evenly_and_all_of_it():
    rng = np.random.default_rng(3)
    for world in (1, 2, 3, 8):
        for count in (0, 1, 2, 7, 100):
            costs = rng.integers(1, 1000, count).tolist()
            dealt = jobs_of(costs, world)
            assert sorted(job for jobs in dealt for job in jobs) == list(range(count))
            assert all(jobs == sorted(jobs) for jobs in dealt)
            loads = [sum(costs[job] for job in jobs) for jobs in dealt]
            assert max(loads) - min(loads) <= max(costs, default=0)
            assert dealt[0] or not count


def _commanded(model, base, texts, history, **more):
    """`distaya eval` as each rank runs it: what it prints, and how it ends."""
    from distaya_ext.cli.eval import evaluate as command

    os.environ["DISTAYA_HISTORY"] = str(history)
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        try:
            command(str(model), texts, str(base), window=16, continuations=0, json=True, **more)
        except DistayaError as error:
            return printed.getvalue(), told.getvalue(), error.exit_code, str(error)
    return printed.getvalue(), told.getvalue(), 0, ""


def test_the_command_speaks_and_writes_once_and_ends_alike(folders, tmp_path):
    arguments = (*folders[:3], tmp_path / "history.jsonl")
    first, *others = run_ranks(2, _gated, *arguments)
    assert json.loads(first[0])["languages"] and "tokens " in first[1]
    assert first[2] == 6 and "quality gate failed" in first[3]
    assert [one[:2] for one in others] == [("", "")]
    assert [one[2:] for one in others] == [first[2:]]
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


def _gated(*arguments):
    return _commanded(*arguments, gate=["max_kl=1e-9"])


def test_tasks_of_the_harness_are_refused(folders):
    with acting(Team(1, 2)), pytest.raises(UsageError, match="run in one process, not in 2"):
        run_tasks(folders[0], ["xcopa_et"])
