"""Gates by name: what is no limit, what breaks one, and the exit codes."""

import json
import math

import pytest
from refusing import refused
from speaking import save_model, save_texts
from typer.testing import CliRunner

from distaya_ext.cli.app import app
from distaya_ext.errors import GateError, UsageError
from distaya_ext.evaluate import GATES, parse_gates
from distaya_ext.evaluate.result import Evaluation, LanguageResult
from distaya_ext.recipe import EvaluateSpec, Recipe


def found(written=True, **languages):
    """An evaluation from {language: (dnll, kl, wrong script)}."""
    rows = [
        LanguageResult(lang, 3, 10, 3 + d, 1.0, base_nll=3.0, dnll=d, ppl_ratio=math.exp(d), kl=kl,
                       wrong_script=wrong, base_wrong_script=0.0)
        for lang, (d, kl, wrong) in languages.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: -row.dnll)
    return Evaluation("new", "old", rows, "windows", 8, 0.1, written={} if written else None)


def test_gates_are_read():
    assert parse_gates([]) == {}
    assert parse_gates(["max_gap=0.1", "max-worst-ppl-ratio=1.15"]) == {
        "max_gap": 0.1, "max_worst_ppl_ratio": 1.15
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_gap", "the number is missing"), ("max_gap=", "no number"),
        ("max_gap=ten", "'ten' is no number"), ("max_gap=nan", "max_gap"),
        ("max_gap=inf", "0 or more, not inf"), ("max_gap=-0.1", "0 or more, not -0.1"),
        ("max_worst_ppl_ratio=0", "above 0, not 0"), ("min_joy=1", "no gate 'min_joy'"),
    ],
)  # fmt: skip
def test_what_is_no_gate(text, said):
    refused(UsageError, lambda: parse_gates([text]), said)


def test_the_gates_there_are_get_listed():
    refused(UsageError, lambda: parse_gates(["max_joy=1"]), *GATES)
    refused(UsageError, lambda: parse_gates(["max_gap"]), *GATES)
    refused(UsageError, lambda: parse_gates(["max_gap=1", "max-gap=2"]), "twice")


def test_each_gate_on_both_sides_of_its_limit():
    it = found(en=(0.1, 0.02, 0.0), ja=(0.5, 0.2, 0.1), sw=(0.2, 0.3, None))
    for name, (value, language) in {
        "max_worst_ppl_ratio": (math.exp(0.5), "ja"), "max_gap": (0.3, "ja"),
        "max_kl": (0.3, "sw"), "max_wrong_script": (0.1, "ja"),
    }.items():  # fmt: skip
        it.gate(**{name: value + 1e-9})
        refused(GateError, lambda n=name, v=value: it.gate(**{n: v - 1e-4}), language, "allowed")
    refused(GateError, lambda: it.gate(max_kl=0.1, max_gap=0.1), "KL of sw", "gap between ja")


@pytest.mark.parametrize("name", ["max_worst_ppl_ratio", "max_gap", "max_kl"])
def test_what_is_not_a_number_passes_no_gate(name):
    it = found(en=(math.nan, math.nan, 0.0), ja=(0.1, 0.1, 0.0))
    refused(GateError, lambda: it.gate(**{name: 9.0}), "nan")
    last = found(en=(0.2, 0.1, 0.0), ja=(0.1, math.nan, 0.0))
    refused(GateError, lambda: last.gate(max_kl=9.0), "KL of ja is nan")


def test_a_gate_on_scripts_needs_a_measurement():
    it = found(xx=(0.1, 0.1, None))
    refused(GateError, lambda: it.gate(max_wrong_script=1.0), "could be measured")
    bare = found(written=False, en=(0.1, 0.1, None))
    refused(UsageError, lambda: bare.gate(max_wrong_script=1.0), "continuations")
    alone = Evaluation("new", None, [LanguageResult("en", 3, 9, 3.0, 1.0)], "windows", 8, 0.1)
    refused(UsageError, lambda: alone.gate(max_kl=1.0), "--against")


def test_recipes_say_gates():
    assert EvaluateSpec(path="t", gate={"max_kl": 1}).gate == {"max_kl": 1.0}
    for gate, said in (
        ({"max_joy": 1}, "no gate 'max_joy'"), ({"max_kl": -1}, "0 or more"),
        ({"max_kl": "much"}, "gate.max_kl"), ({"max_wrong_script": 0.1}, "continuations"),
    ):  # fmt: skip
        evaluate = {"path": "t", "gate": gate, "continuations": 0}
        refused(UsageError, lambda e=evaluate: Recipe(model="m", bits=4, evaluate=e), said)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    root = tmp_path_factory.mktemp("gate")
    model, base = save_model(root / "a", seed=1), save_model(root / "b", seed=2)
    texts = save_texts(root / "texts", repeat=4)
    return ["eval", model, "--against", base, "--texts", texts, "--window", 16, "-q",
            "--continuations", 1, "--new-tokens", 3]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_broken_gate_exits_6_behind_the_result(asked):
    told = run(*asked, "--gate", "max_kl=0.0", "--gate", "max_worst_ppl_ratio=1000")
    assert told.exit_code == 6 and "95 % CI" in told.stdout
    (line,) = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    assert "quality gate failed: the KL of" in line and "and" not in line.split("KL", 1)[1]
    told = run(*asked, "--json", "--gate", "max_gap=0", "--gate", "max_kl=0")
    assert told.exit_code == 6 and json.loads(told.stdout)["worst_language"]
    assert run(*asked, "--gate", "max_kl=1000").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gate", "max_joy=1"], "max_worst_ppl_ratio, max_gap, max_kl, max_wrong_script"),
        (["--gate", "max_kl=much"], "no number"),
        (["--gate", "max_wrong_script=0.1", "--continuations", "0"], "continuations"),
        (["--new-tokens", "500"], "128 positions"),
        (["--limit", "3"], "--tasks"),
    ],
)
def test_what_is_asked_wrongly_exits_2_with_nothing_done(asked, flags, said):
    told = run(*asked, *flags)
    assert told.exit_code == 2 and told.stdout == "" and said in told.stderr


def test_a_gate_between_models_needs_two(asked):
    told = run(*asked[:2], *asked[4:], "--gate", "max_kl=1")
    assert told.exit_code == 2 and "--against" in told.stderr
    told = run("eval", asked[1])
    assert told.exit_code == 2 and "--texts" in told.stderr and "--tasks" in told.stderr
