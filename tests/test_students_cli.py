"""`distaya students` and `distaya shrink` as users see them."""

import json

import pytest
import speaking
from test_cli import distaya, refused
from transformers import AutoModelForCausalLM

from distaya_ext.cli.students import parse_layers
from distaya_ext.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return speaking.save_model(tmp_path_factory.mktemp("cli") / "teacher", seed=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return speaking.save_texts(tmp_path_factory.mktemp("cli") / "texts", repeat=40)


def test_shrink_then_students(model, texts, tmp_path):
    out = tmp_path / "small"
    result = distaya("shrink", model, "--out", out, "--layers", 1, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["layers"] == [0] and told["layers_by"] == "spread"
    student = AutoModelForCausalLM.from_pretrained(out)
    assert told["parameters"] == sum(p.numel() for p in student.parameters())
    arguments = [
        "students",
        out,
        tmp_path / "gone",
        "no/such",
        "--offline",
        "--teacher",
        model,
        "--texts",
        texts,
    ]
    arguments += ["--budget", told["parameters"], "--characters", 60]
    result = distaya(*arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    by_name = {row["name"]: row for row in found["students"]}
    assert by_name[str(out)]["config"]["parameters"] == told["parameters"]
    assert (
        by_name[str(out)]["same_tokenizer"] and "gone" in by_name[str(tmp_path / "gone")]["error"]
    )
    assert "in the local hub cache (offline)" in by_name["no/such"]["error"]
    assert set(found["teacher"]["bits_per_byte"]["languages"]) == {"en", "es", "ja"}
    assert found["recommended"] in by_name
    shown = distaya(*arguments, "--no-shapes")
    assert shown.exit_code == 0 and f"Take {out}." in shown.stdout
    for words in ("bits/byte", "bytes/token", "neither an existing folder", "teacher's", "It fits"):
        assert words in shown.stdout
    assert "measurements 2/2" in shown.stderr


def test_shrink_in_words(model, texts, tmp_path):
    result = distaya(
        "shrink", model, "--out", tmp_path / "s", "--hidden", 16, "--intermediate", 32,
        "--texts", texts, "--tokens", 300, "--window", 16,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for words in ("layers (activations) 2/2", "layers (norms) 2/2"):
        assert words in result.stderr
    for words in ("layers 0,1, hidden 16, MLP 32, 4 heads", "the worst norm keeps"):
        assert words in result.stdout


def test_layers_as_flags():
    assert (
        parse_layers("6") == 6 and parse_layers("0, 1,4") == [0, 1, 4] and parse_layers("3,") == [3]
    )
    for text in ("", "a", "1,,2", "-1", "1.5"):
        with pytest.raises(UsageError, match="neither a number nor a list"):
            parse_layers(text)


def test_refusals(model, texts, tmp_path):
    asked = ["students", model, "--texts", texts, "--budget"]
    refused(2, *asked, "lots", words=["such as 1.5B"])
    refused(3, *asked, "1K", "--quiet", words=["no student fits into 1K", "smallest found is"])
    refused(2, *asked, "1B", "--languages", "en,tlh", words=["no text in tlh"])
    refused(2, *asked, "1B", "--languages", ",", words=["names no language"])
    refused(3, "students", tmp_path, "--texts", texts, "--budget", "1B", words=["is empty"])
    refused(2, "shrink", model, "--out", tmp_path / "s", "--hidden", 16, words=["seen on texts"])
    refused(2, "shrink", model, "--out", tmp_path / "s", words=["would be its teacher"])
    refused(
        2,
        "shrink",
        model,
        "--out",
        tmp_path / "s",
        "--layers",
        1,
        "--layers-by",
        "bi",
        words=["seen on texts"],
    )
    assert not (tmp_path / "s").exists()
