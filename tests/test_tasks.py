"""Tasks of lm-evaluation-harness on dense and packed models, with data of our own."""

import json
import math
import sys

import pytest
import torch
import yaml
from refusing import refused
from typer.testing import CliRunner

import distaya_ext
from distaya_ext import Recipe, compress
from distaya_ext.cli.app import app
from distaya_ext.errors import InputError, UsageError
from distaya_ext.evaluate import load
from distaya_ext.runtime.modules import Packed
from distaya_ext.tasks import mcnemar, run_tasks
from distaya_ext.tasks.result import rows_of
from distaya_ext.tasks.run import wrap

NANO = distaya_ext.__path__[0] + "/assets/nano-aya"
QUESTIONS = [
    {"q": "The committee said on", "a": "Monday that", "b": "qqz ]]", "label": 0},
    {"q": "One of the", "a": "( ;;", "b": "most important", "label": 1},
    {"q": "Die Regierung hat", "a": "die Stadt", "b": "xk xk", "label": 0},
    {"q": "He was born", "a": "in the", "b": "the in", "label": 1},
    {"q": "La ville", "a": "est une", "b": "une une est est", "label": 0},
]
PICK = {
    "task": "pick", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "q.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
    "doc_to_choice": "{{[a, b]}}", "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
}  # fmt: skip
SAY = PICK | {
    "task": "say", "output_type": "loglikelihood", "doc_to_target": "{{' ' + a}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}  # fmt: skip
del SAY["doc_to_choice"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("nano") / "packed"
    fields = {"method": "magnitude", "nm": "2:4", "bits": 4, "embed_bits": 8}
    compress(NANO, out, Recipe(model=NANO, **fields))
    return out


def write(folder, *tasks, questions=QUESTIONS):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions)
    (folder / "q.jsonl").write_text(lines, encoding="utf-8")
    for number, task in enumerate(tasks):
        text = task if isinstance(task, str) else yaml.safe_dump(task)
        (folder / f"t{number}.yaml").write_text(text, encoding="utf-8")
    return folder


def said_by_us(loaded, context, more):
    """log p(more | context) by one forward pass of our own loader's model."""
    read = loaded.tokenizer
    whole = read(context + more, return_tensors="pt")["input_ids"]
    first = len(read(context)["input_ids"])
    with torch.inference_mode():
        logs = loaded.model(input_ids=whole).logits[0].float().log_softmax(-1)
    return sum(float(logs[i - 1, whole[0, i]]) for i in range(first, whole.shape[1]))


def test_both_kinds_of_task_on_both_kinds_of_model(packed, tmp_path):
    folder = write(tmp_path / "tasks", PICK, SAY)
    found = run_tasks(packed, ["pick", "say"], against=NANO, task_path=folder, offline=True)
    rows = {(row.task, row.metric): row for row in found.rows}
    assert list(rows) == [("pick", "acc"), ("say", "perplexity"), ("say", "acc")]
    for loaded, key in ((load(packed), "value"), (load(NANO), "base")):
        assert any(isinstance(m, Packed) for m in loaded.model.modules()) == (key == "value")
        better = [
            said_by_us(loaded, q["q"], " " + q["a"]) > said_by_us(loaded, q["q"], " " + q["b"])
            for q in QUESTIONS
        ]
        right = [better[i] == (q["label"] == 0) for i, q in enumerate(QUESTIONS)]
        assert getattr(rows["pick", "acc"], key) == sum(right) / 5
        mean = sum(said_by_us(loaded, q["q"], " " + q["a"]) for q in QUESTIONS) / 5
        assert getattr(rows["say", "perplexity"], key) == pytest.approx(math.exp(-mean), rel=2e-2)
    row = rows["pick", "acc"]
    assert row.questions == 5 and row.shots == 0 and row.p == mcnemar(row.lost, row.won)
    assert (
        row.delta == pytest.approx(row.value - row.base) == pytest.approx((row.won - row.lost) / 5)
    )
    assert row.delta_interval[0] <= row.delta <= row.delta_interval[1]
    assert rows["say", "perplexity"].p is None


def test_a_packed_model_is_a_model_of_the_harness(packed):
    from lm_eval.api.instance import Instance

    loaded = load(packed, exact=True)
    lm = wrap(loaded)
    asked = [(q["q"], " " + q["a"]) for q in QUESTIONS]
    made = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    for (context, more), (log, _) in zip(asked, lm.loglikelihood(made), strict=True):
        assert log == pytest.approx(said_by_us(loaded, context, more), abs=2e-3)


def test_limit_and_shots(tmp_path):
    folder = write(tmp_path / "tasks", PICK | {"fewshot_split": "test"})
    (row,) = run_tasks(NANO, ["pick"], task_path=folder, limit=3, num_fewshot=1).rows
    assert row.questions == 3 and row.shots == 1 and row.base is None and row.delta is None
    assert row.value_interval[0] <= row.value <= row.value_interval[1]


def test_a_task_of_the_harness_on_local_data(tmp_path):
    lines = [
        {"premise": f"Mees {i} kukkus.", "choice1": "Ta jooksis.", "choice2": "Ta magas.",
         "question": ("cause", "effect")[i % 2], "label": i % 2} for i in range(4)
    ]  # fmt: skip
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "q.jsonl"}}}
    folder = write(tmp_path / "tasks", {"task": "xcopa_et", **where}, questions=lines)
    (row,) = run_tasks(NANO, ["xcopa_et"], task_path=folder, offline=True).rows
    assert row.task == "xcopa_et" and row.metric == "acc" and row.questions == 4


@pytest.mark.parametrize(
    ("lost", "won", "p"), [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (1, 9, 22 / 1024), (0, 1, 1.0)]
)
def test_mcnemar_counts_coins(lost, won, p):
    assert mcnemar(lost, won) == mcnemar(won, lost) == pytest.approx(p)


def test_mcnemar_of_many_questions():
    assert 0 < mcnemar(40_000, 41_000) < 1e-3  # whole numbers do not overflow


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(UsageError, lambda: run_tasks(NANO, ["pick"]), "pip install 'distaya-ext[tasks]'")


def test_models_are_paired_question_by_question():
    def harness(acc, loss):
        samples = [
            {"doc_id": i, "filter": "none", "acc": a, "loss": x}
            for i, (a, x) in enumerate(zip(acc, loss, strict=True))
        ]
        found = {"alias": "t", "acc,none": sum(acc) / 4, "acc_stderr,none": "N/A"}
        found |= {"loss,none": sum(loss) / 4, "odd,none": 7.0}
        return {"results": {"t": found}, "samples": {"t": samples}, "n-shot": {"t": 2}}

    model = harness([1, 0, 0, 0], [1.0, 2.0, 3.0, 4.0])
    base = harness([0, 1, 1, 0], [1.0, 1.0, 1.0, 1.0])
    acc, loss, odd = rows_of(model, base)
    assert (acc.lost, acc.won, acc.p) == (2, 1, 1.0)
    assert (acc.value, acc.base, acc.delta, acc.shots) == (0.25, 0.5, -0.25, 2)
    assert (loss.delta, loss.p, loss.questions) == (1.5, None, 4)
    assert 0.0 <= loss.delta_interval[0] < 1.5 < loss.delta_interval[1] <= 3.0
    assert odd.delta == 0.0 and odd.value_interval is odd.delta_interval is None
    (alone, *_) = rows_of(model, None)
    assert alone.base is None and alone.lost is None


def test_a_task_there_is_not(tmp_path, monkeypatch):
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager  # reading all files of the harness takes seconds
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_defaults, include_path=None: real(
            include_defaults=False, include_path=include_path
        ),
    )
    folder = write(tmp_path / "tasks", PICK)
    refused(UsageError, lambda: run_tasks(NANO, ["pik"], task_path=folder), "'pik'", "pick")
    refused(UsageError, lambda: run_tasks(NANO, [" "]), "name a task")


EVIL = PICK | {"doc_to_text": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (yaml.safe_dump(PICK) + "process_docs: !function u.f\n", "runs Python"),
        (PICK | {"class": "x"}, "class would run code"),
        (PICK | {"dataset_path": "someone/data"}, "'someone/data' must be one of json"),
        (PICK | {"dataset_kwargs": {"data_files": "gone.jsonl"}}, "no data file gone.jsonl"),
        (PICK | {"dataset_kwargs": {}}, "must hold data_files"),
        (PICK | {"metric_list": [{"metric": "./evil.py"}]}, "'./evil.py' is not one of"),
        (PICK | {"include": "../../outside.yaml"}, "outside the task folder"),
        (PICK | {"include": "t0.yaml"}, "8 deep"),
        (PICK | {"task": ["a"]}, "task must be a name"),
        (PICK | {"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
        (PICK | {"test_split": "dev"}, "cannot be"),
        ("[1, 2]", "must be a mapping, not list"),
        ("{", "not plain YAML"),
        (EVIL, "unsafe"),
    ],
)
def test_task_files_that_cannot_be_used(tmp_path, task, said):
    folder = write(tmp_path / "tasks", task)
    (folder / "u.py").write_text("raise SystemExit('this must not run')\n")
    line = refused(InputError, lambda: run_tasks(NANO, ["pick"], task_path=folder), said)
    assert line is None or "\n" not in line


def test_data_that_is_none(tmp_path):
    folder = write(tmp_path / "tasks", PICK)
    (folder / "q.jsonl").write_text("{torn\n")
    refused(InputError, lambda: run_tasks(NANO, ["pick"], task_path=folder), "cannot be loaded")
    (folder / "q.jsonl").write_text("")
    refused(InputError, lambda: run_tasks(NANO, ["pick"], task_path=folder), "cannot be")
    refused(UsageError, lambda: run_tasks(NANO, ["pick"], task_path=folder / "x"), "no folder")


def test_the_command(packed, tmp_path):
    folder = write(tmp_path / "tasks", PICK)
    asked = ["eval", str(packed), "--tasks", "pick", "--task-path", str(folder), "--offline", "-q"]
    told = CliRunner().invoke(app, [*asked, "--against", NANO])
    assert told.exit_code == 0, told.output
    assert "McNemar" in told.stdout and "before" in told.stdout and "pick" in told.stdout
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert told["tasks"][0]["task"] == "pick" and told["base"] is None and told["lm_eval"]
    wrong = CliRunner().invoke(app, [*asked, "--texts", str(folder)])
    assert wrong.exit_code == 2 and "--texts" in wrong.stderr
