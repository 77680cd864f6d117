"""Scoring and choosing layers by several ranks: the same bits as by one process."""

import contextlib
import io
from dataclasses import replace
from importlib import import_module

import pytest
import tiny
from loud import config
from ranked import Ranks, run_ranks
from speaking import save_texts, tokenizer

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import Calibration
from distaya_ext.influence.choose import Study, choose
from distaya_ext.influence.spec import SCORES, DropSpec
from distaya_ext.ranks import team


def _windows(count):
    """Windows in chunks of two, the last one smaller, in uneven languages."""
    import_module("distaya_ext.compress.calibrate").CHUNK_TOKENS = 2 * tiny.WINDOW
    languages = [("en", "fr", "en")[i % 3] for i in range(count)]
    return Calibration(tiny.windows(count).ids, languages)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "loud", config("cohere2", 4))


def _told(found):
    """Scores and choices as plain values, every float with all its bits."""
    tables = {name: table.tobytes() for name, table in found.tables.items()}
    runs = None if found.runs is None else (found.runs.tobytes(), found.runs_last.tobytes())
    nll = None if found.nll is None else found.nll.tobytes()
    return found.candidates, found.firsts, tables, runs, nll


def _studied(folder, count):
    checkpoint, seen = open_checkpoint(folder), []
    study = Study(checkpoint, _windows(count), run=2, parts=True)
    specs = [DropSpec(count=2, score=score) for score in SCORES]
    scores, choices = study.go(specs, on_event=seen.append)
    rounds = [[(one.went, _told(one.scores)) for one in choice.rounds] for choice in choices]
    shown = [choice.to_dict() for choice in choices]
    return (_told(scores), scores.to_dict(), rounds, shown), seen, team().read


@pytest.fixture(scope="module")
def alone(model):
    """By the number of windows, what one process finds."""
    return {count: run_ranks(1, _studied, model, count)[0] for count in (3, 7)}


@pytest.mark.parametrize(("world", "count"), [(2, 7), (3, 7), (3, 3)])  # 4 chunks, 4, 2
def test_every_rank_has_the_scores_and_choices_of_one_process(world, count, model, alone):
    expected, events, _ = alone[count]
    found = run_ranks(world, _studied, model, count)
    assert all(told == expected for told, _, _ in found)
    rounds = expected[2][SCORES.index("kl")]
    assert len(rounds) == 2 and rounds[0][1] != rounds[1][1]  # greedy: measured anew
    # Rank 0 alone tells, of its own share.
    (_, seen, _), *others = found
    assert not any(each for _, each, _ in others)
    assert seen[-1].done == seen[-1].total < events[-1].total
    # All together read each layer once a walk, as one process does.
    bytes_read = [count for _, _, count in found]
    assert all(bytes_read) and max(bytes_read) < 0.8 * sum(bytes_read)


def _read_once(folder):
    checkpoint = open_checkpoint(folder)
    Study(checkpoint, _windows(5), ["bi"]).go([])
    return team().read


def test_a_walk_reads_every_byte_once(model):
    """Embedding, norm and head once, and each layer once: together no more than the folder."""
    assert sum(run_ranks(2, _read_once, model)) == open_checkpoint(model).nbytes


def _spilled(folder, scratch, limit):
    import_module("distaya_ext.compress.budget").physical_bytes = lambda: limit
    stores = []
    store = import_module("distaya_ext.influence.walk").Store

    class Seen(store):
        def __init__(self, *args, **more):
            stores.append(args)
            super().__init__(*args, **more)

    import_module("distaya_ext.influence.walk").Store = Seen
    spec = DropSpec(count=1, score="kl")
    choice = choose(open_checkpoint(folder), _windows(7), spec, scratch=scratch)
    return choice.to_dict(), [bool(args) for args in stores], list(scratch.iterdir())


def test_every_rank_spills_into_a_folder_of_its_own(model, tmp_path):
    found = run_ranks(2, _spilled, model, tmp_path, 1 << 16)
    kept = run_ranks(1, _spilled, model, tmp_path, 1 << 40)
    assert all(choice == kept[0][0] for choice, _, _ in found)
    assert all(away == [True] for _, away, _ in found) and kept[0][1] == [False]
    assert not list(tmp_path.iterdir())


def _overflowing(folder):
    windows = _windows(7)
    ids = windows.ids.clone()
    ids[4, 5] = 2  # a token that no other window holds
    choose(open_checkpoint(folder), replace(windows, ids=ids), DropSpec(count=1, score="bi"))


def test_a_window_that_overflows_is_told_of_by_the_rank_that_has_it(tmp_path):
    folder = tiny.make(tmp_path / "hot", config("gemma", 3))
    _scale_token(folder, 2)
    ((_, (kind, expected, _)),) = Ranks(1, _overflowing, folder).ends()
    assert kind == "InputError" and "the output of layer 0 is not finite" in expected
    ends = [what for _, what in Ranks(2, _overflowing, folder).ends()]
    assert ends[1][:2] == ("InputError", expected)  # windows 4 to 6 are rank 1's
    assert ends[0][0] == "LostError"


def _scale_token(folder, token):
    """An embedding row that is finite, until Gemma multiplies it by the root of its length."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _commanded(folder, texts, plot):
    """`distaya layers` as each rank runs it, and whether it opened a text."""
    from distaya_ext.cli.layers import layers as command

    if not team().first:
        texts = texts / "not here"  # only rank 0 reads them
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        command(str(folder), texts, scores="bi,kl", tokens=192, window=32, plot=plot, json=True)
    return printed.getvalue(), told.getvalue(), plot.exists()


def test_the_command_reads_texts_speaks_and_draws_on_rank_0_alone(tmp_path):
    folder = tiny.make(tmp_path / "model", config("cohere2", 2, vocab_size=300))
    tokenizer().save_pretrained(folder)
    texts = save_texts(tmp_path / "texts", repeat=12)
    ((alone, _, _),) = run_ranks(1, _commanded, folder, texts, tmp_path / "one.png")
    first, other = run_ranks(2, _commanded, folder, texts, tmp_path / "two.png")
    assert first[0] == alone and "forwards " in first[1] and first[2]
    assert other[:2] == ("", "")
