"""README.md of a folder: facts, front matter that hubs read, and whose card it is."""

import json

import pytest
import tiny
import yaml
from report_case import evaluation, fill

from distaya_ext.checkpoint import Staging, copy_companions
from distaya_ext.checkpoint.readme import is_card, seal
from distaya_ext.report import write_pages

SOURCE = """---
license: other
license_name: aya-nc
license_link: LICENSE
language: [sw, ar, no]
tags: [multilingual, "a: b"]
library_name: transformers
pipeline_tag: text-generation
model-index: {name: [x]}
---
# The source
"""


def card_of(folder):
    write_pages(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_a_card_tells_the_facts(tmp_path):
    folder = fill(tmp_path / "out")
    (folder / "README.source.md").write_text(SOURCE)
    (folder / "LICENSE").write_text("no")
    matter, body = card_of(folder)
    assert matter == {
        "license": "other",
        "license_name": "aya-nc",
        "license_link": "LICENSE",
        "language": ["sw", "ar", "no"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["multilingual", "a: b", "distaya_ext"],
    }
    for words in (
        "Swahili lost most",
        "| Swahili (sw) | +0.300 | +0.260 to +0.340 | ×1.35 | 1.400 → 1.500 | 0.100 | 90.0 % |",
        "| Reading the prompt, tokens/s | 900 | 1,000 | ×0.90, no gain here |",
        "Modules that were not solved as asked: 1 of 6.",
        "distaya_ext.load(",
        "stock transformers",
        "[README.source.md](README.source.md)",
        "[LICENSE](LICENSE)",
        "## Limits",
    ):
        assert words in body, words
    assert "private" not in body


@pytest.mark.parametrize(
    ("method", "library", "words"),
    [
        ("distaya", "distaya_ext", "which nothing else reads"),
        ("compressed-tensors", "transformers", "with the compressed-tensors package"),
        ("gptq", "transformers", "readers of that format"),
        ("unheard-of", "transformers", "own, which nothing else reads"),
    ],
)
def test_a_card_says_who_can_read_it(tmp_path, method, library, words):
    folder = fill(tmp_path / "out")
    (folder / "README.source.md").write_text(SOURCE)
    config = {"model_type": "cohere", "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    matter, body = card_of(folder)
    assert matter["library_name"] == library and words in body


def test_a_hub_model_is_the_base(tmp_path):
    folder = fill(tmp_path / "out")
    text = (folder / "recipe.yaml").read_text().replace("/srv/private/aya", "CohereLabs/aya-8b")
    (folder / "recipe.yaml").write_text(text)
    matter, _ = card_of(folder)
    assert matter["base_model"] == "CohereLabs/aya-8b"
    assert matter["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    "matter",
    [
        "license: [unclosed",
        "a: &a [1]\nb: " + "*a " * 40,
        "license: !!python/object/apply:os.system [ls]",
        "[" * 500,
        "license: a\nlicense: b",
    ],
)
def test_damaged_front_matter_is_told_and_not_repeated(tmp_path, matter):
    """The source's readme is no reason to lose a compression, and nothing of it is guessed."""
    folder = fill(tmp_path / "out")
    (folder / "README.source.md").write_text(f"---\n{matter}\n---\n# x\n")
    found, body = card_of(folder)
    assert "license" not in found and "is not plain YAML" in body


def test_hostile_front_matter_stays_a_string(tmp_path):
    folder = fill(tmp_path / "out")
    hostile = yaml.safe_dump({"license": "x\n---\n# <script>", "tags": ["\u202e", 3, None, [1]]})
    (folder / "README.source.md").write_text(f"---\n{hostile}---\n")
    found, body = card_of(folder)
    assert found["license"] == "x --- # <script>" and found["tags"][1:] == ["3", "distaya_ext"]
    assert "U+202E" in found["tags"][0] and "<script>" not in body


def test_strings_of_files_are_no_markdown(tmp_path):
    folder = fill(tmp_path / "out")
    told = evaluation(notes=["a | b\n# not a title\n<img src=x> [x](y) `z`"])
    (folder / "evaluation.json").write_text(json.dumps({"steps": {"e": told}, "gate": None}))
    _, body = card_of(folder)
    assert r"a \| b \# not a title \<img src=x\> \[x\](y) \`z\`" in body


def test_an_edited_card_is_kept(tmp_path):
    """Ours is written anew with every result; what somebody wrote stays, also in a new run."""
    folder = fill(tmp_path / "out")
    write_pages(folder)
    card = folder / "README.md"
    assert is_card(card)
    first = card.read_bytes()
    told = evaluation(notes=["something new"])
    (folder / "evaluation.json").write_text(json.dumps({"steps": {"e": told}, "gate": None}))
    write_pages(folder)
    assert card.read_bytes() != first and is_card(card)
    card.write_text(card.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    edited = card.read_bytes()
    assert card not in write_pages(folder) and card.read_bytes() == edited
    with Staging(folder, overwrite=True) as staging:
        fill(staging.model)
        write_pages(staging.model)
        staging.publish()
    assert card.read_bytes() == edited


def test_our_own_card_of_an_older_run_is_replaced(tmp_path):
    folder = fill(tmp_path / "out")
    write_pages(folder)
    old = (folder / "README.md").read_bytes()
    with Staging(folder, overwrite=True) as staging:
        fill(staging.model, "speed.json")
        write_pages(staging.model)
        staging.publish()
    assert (folder / "README.md").read_bytes() != old and is_card(folder / "README.md")


def test_a_seal_breaks_with_any_letter(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(seal("text\n"), encoding="utf-8")
    assert is_card(path)
    for broken in ("Text\n" + seal("text\n")[5:], seal("text\n") + "more", "text\n", ""):
        path.write_text(broken, encoding="utf-8")
        assert not is_card(path)
    path.write_bytes(b"\xff\xfe")
    assert not is_card(path)


@pytest.mark.parametrize(
    ("own", "beside", "carried"),
    [
        ("the source", None, "the source"),
        (seal("ours\n"), "the first", "the first"),
        (seal("ours\n"), None, None),
        (seal("ours\n") + "edited", "the first", seal("ours\n") + "edited"),
    ],
)
def test_whose_card_goes_along(tmp_path, own, beside, carried):
    """The source's own readme is kept as README.source.md, through any number of our runs."""
    source, target = tiny.make(tmp_path / "model", tiny.FAMILIES["llama"]), tmp_path / "target"
    target.mkdir()
    (source / "README.md").write_text(own)
    if beside is not None:
        (source / "README.source.md").write_text(beside)
    names = copy_companions(source, target)
    assert not (target / "README.md").exists()
    assert ("README.source.md" in names) == (carried is not None)
    if carried is not None:
        assert (target / "README.source.md").read_text() == carried
