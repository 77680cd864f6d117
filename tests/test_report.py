"""report.html: what it says, what it says when something is missing, and that it loads nothing."""

import itertools
import json
import os
import re
from importlib import resources

import pytest
import report_case
from report_case import Page, evaluation, fill, results, speed

from distaya_ext.errors import InputError
from distaya_ext.finished import complete
from distaya_ext.report import read, store, write_pages

SECTIONS = [
    "verdict", "languages", "layers", "degraded", "calibration", "size", "speed", "training",
    "samples", "changes", "again", "limits",
]  # fmt: skip


def rewrite(path, **fields):
    told = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(told | fields), encoding="utf-8")


def page_of(folder):
    write_pages(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_whole_page(tmp_path):
    """Every part is there, in its order, with the numbers of the files."""
    folder = fill(tmp_path / "out")
    before = {"time": "2026-01-02T03:04:05+00:00", "version": "0.0.9", "changes": [
        {"what": "dnll of sw", "was": 0.1, "now": 0.3, "worse": True}]}  # fmt: skip
    rewrite(folder / "evaluation.json", before=before, asked={"max_gap": 0.5})
    page = Page(page_of(folder))
    assert page.problems == []
    assert [a["id"] for a in page.all("section")] == SECTIONS
    for words in (
        "Swahili lost most: its perplexity is 1.35 times the original's; English has 1.05 times.",
        "+0.300 nats per token, 95 % interval +0.260 to +0.340",
        "4 of 4 languages lost more than chance explains",
        "Gate passed max_gap at most 0.5",
        "2:4 zeros, 4-bit weights in groups of 32",
        "1 of 6 modules are degraded",
        "no input was ever active",
        "something was odd in sw.txt",
        "4,096 tokens in windows of 64",
        "Decoding, tokens/s 200 100 ×2.00 ×4.00 if reading weights were all; memory gives 9,537",
        "Reading the prompt, tokens/s 900 1,000 ×0.90 no gain here",
        "Best on held-out text: step 3, 0.2100 nats per label.",
        "Layers left out: 1.",
        "dnll of sw 0.1000 0.3000 worse",
        "0.0 % → 3.1 %",
        "distaya compress --recipe recipe.yaml --out NEW",
        "Perplexity is not everything.",
        "As few as 20 samples",
    ):
        assert words in page.text, words
    bits = 8 * (6 * 64 * 64 / 2 + 16384) / (6 * 64 * 64 + 128 * 64)
    assert f"{bits:.3f} bits per weight with the embedding, 4.000 without" in page.text
    assert len(page.all("svg")) > 6
    assert "private" not in page.text and "/srv" not in page.text


def test_the_same_facts_give_the_same_bytes(tmp_path):
    folder = fill(tmp_path / "out")
    first, card = page_of(folder), (folder / "README.md").read_bytes()
    elsewhere = fill(tmp_path / "another" / "place")
    assert page_of(elsewhere) == first == page_of(folder)
    assert (elsewhere / "README.md").read_bytes() == card == (folder / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("gate", "asked", "words"),
    [
        ("the gap is 0.3 (0.1 allowed) in /srv/private/x", {}, "Gate failed the gap is 0.3"),
        (None, {}, "No gate No limit was set"),
    ],
)
def test_the_gate(tmp_path, gate, asked, words):
    folder = fill(tmp_path / "out")
    rewrite(folder / "evaluation.json", gate=gate, asked=asked)
    assert words in Page(page_of(folder)).text


def test_the_gate_of_a_chain_is_in_its_recipe(tmp_path):
    folder = fill(tmp_path / "out")
    steps = {"compress": evaluation(), "heal": evaluation(dnll=0.01)}
    rewrite(folder / "evaluation.json", steps=steps)
    with open(folder / "recipe.yaml", "a") as file:
        file.write("evaluate:\n  path: texts\n  gate: {max_worst_ppl_ratio: 1.5}\n")
    text = Page(page_of(folder)).text
    assert "Gate passed max_worst_ppl_ratio at most 1.5" in text
    assert "After each step of the chain" in text and "heal +0.010 Swahili" in text


MISSING = {
    "evaluation.json": (
        "distaya eval . --against MODEL --texts TEXTS --report", ["verdict", "languages"]
    ),
    "speed.json": ("distaya bench model . --against MODEL --report", ["speed"]),
    "results.json": (None, []),
    "training.json": (None, []),
    "layers.csv": (None, ["layers"]),
    "layers.json": (None, ["layers"]),
    "recipe.yaml": (None, ["again"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_what_was_not_measured_is_said(tmp_path, name):
    """Each file may be missing: the page still stands, and names the command that fills the gap."""
    command, still = MISSING[name]
    page = Page(page_of(fill(tmp_path / "out", name)))
    assert page.problems == []
    shown = [a["id"] for a in page.all("section")]
    assert set(still) <= set(shown)
    assert command is None or command in page.text
    gone = {"results.json": {"degraded", "calibration", "size"}, "training.json": {"training"}}
    assert not gone.get(name, set()) & set(shown)


def test_nothing_to_tell_gives_no_page(tmp_path):
    folder = fill(
        tmp_path / "out", "results.json", "evaluation.json", "speed.json", "training.json",
        "layers.json", "layers.csv", "metrics.jsonl",
    )  # fmt: skip
    assert [path.name for path in write_pages(folder)] == ["README.md"]
    (folder / "config.json").unlink()
    (folder / "README.md").unlink()
    assert write_pages(folder) == []


def test_an_older_folder_counts_no_fallbacks(tmp_path):
    folder = fill(tmp_path / "out")
    told = results()
    del told["fallbacks"]
    (folder / "results.json").write_text(json.dumps(told))
    assert "did not count fallbacks" in Page(page_of(folder)).text


def test_none_degraded_is_said(tmp_path):
    folder = fill(tmp_path / "out")
    none = {"kinds": {}, "modules": [], "degraded": 0, "of": 6}
    rewrite(folder / "results.json", fallbacks=none)
    assert "None of 6 modules needed a fallback." in Page(page_of(folder)).text


def test_dense_twins_gain_nothing(tmp_path):
    """Two models that do the same work differ by noise, whatever was measured."""
    folder = fill(tmp_path / "out")
    row = speed()["rows"][1]
    rows = [row | {"decode_rate": 150.0, "prefill_rate": 2000.0}, row]
    rewrite(folder / "speed.json", rows=rows, ratios={"decode": 1.5, "prefill": 2.0, "bytes": 1.0})
    page = Page(page_of(folder))
    assert page.text.count("no gain here") == 3
    assert (
        "Decoding no gain" in page.text and "what differs between their rates is noise" in page.text
    )


def test_an_evaluation_without_a_base(tmp_path):
    folder = fill(tmp_path / "out")
    told = evaluation()
    keep = ("language", "samples", "tokens", "nll", "bits_per_byte")
    told["languages"] = [{k: row[k] for k in keep} for row in told["languages"]]
    for key in ("base", "base_nll", "dnll", "gap", "samples"):
        del told[key]
    (folder / "evaluation.json").write_text(json.dumps({"steps": {"evaluate": told}, "gate": None}))
    page = Page(page_of(folder))
    assert page.problems == [] and "Nothing was compared" in page.text


DAMAGE = {
    "results.json": ('{"method": 3}', "results.json of out is damaged at method"),
    "evaluation.json": ('{"steps": {}}', "evaluation.json of out is damaged at steps"),
    "speed.json": ('{"rows": [{"nbytes": 0}]}', "speed.json of out is damaged at rows.0"),
    "training.json": ("[1, 2]", "training.json of out must hold a JSON object"),
    "layers.json": ('{"dropped": ["x"]}', "layers.json of out is damaged at dropped.0"),
    "steps.json": ('{"steps": ', "steps.json of out is not valid JSON"),
    "layers.csv": ("module,bytes\nm,many\n", "layers.csv of out is damaged in line 2, bytes"),
    "metrics.jsonl": ('{"step": 1, "loss": "x"}\n', "metrics.jsonl of out is damaged in line 1"),
    "recipe.yaml": ("# distaya_ext recipe\n- 1\n", "recipe.yaml of out is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_facts_are_one_sentence(tmp_path, name):
    text, sentence = DAMAGE[name]
    folder = fill(tmp_path / "out")
    (folder / name).write_text(text)
    with pytest.raises(InputError) as error:
        write_pages(folder)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_a_finished_run_survives_files_that_are_not_ours(tmp_path):
    """complete() ends hours of work: what it cannot read is left out of the page, and named."""
    folder = fill(tmp_path / "out")
    for name, (text, _) in DAMAGE.items():
        if name != "recipe.yaml":
            (folder / name).write_text(text)
    (folder / "results.json").write_text(json.dumps(results()))
    complete(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.problems == [] and "1 of 6 modules are degraded" in page.text
    for name, (_, sentence) in DAMAGE.items():
        assert ("Left out: " + sentence in page.text) == (
            name not in ("recipe.yaml", "results.json")
        )


def test_a_page_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    folder = fill(tmp_path / "out")
    monkeypatch.setattr("distaya_ext.report.page.context", lambda facts: 1 / 0)
    with pytest.warns(RuntimeWarning, match="no report was written: division by zero"):
        complete(folder)
    assert not (folder / "report.html").exists()


def test_the_training_of_the_model_before_is_not_ours(tmp_path):
    folder = fill(tmp_path / "out", "steps.json")
    text = Page(page_of(folder)).text
    assert "This is how the model before compression was trained." in text
    assert "Trained in" not in text and "groups of 32, trained" not in text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e300", "1" + "0" * 400, '"three"'])
def test_numbers_that_are_none(tmp_path, number):
    folder = fill(tmp_path / "out")
    text = (folder / "results.json").read_text().replace('"loss": 12.5', f'"loss": {number}')
    (folder / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results.json of out .*(loss|JSON)"):
        write_pages(folder)


HOSTILE = "<script>alert(1)</script>\"'`{{ 7*7 }}</style></svg>\u202e\x00\x1b[31m\ud800&amp;"


def test_hostile_texts_stay_texts(tmp_path):
    """Whatever a model said, or a file names, is text on the page and nothing else."""
    folder = fill(tmp_path / "out")
    told = evaluation(notes=[HOSTILE], base=HOSTILE)
    told["languages"][0]["language"] = HOSTILE
    told["samples"] = [
        {"language": HOSTILE, "prompt": HOSTILE, "base": HOSTILE + "a", "model": HOSTILE + "b"}
    ]
    (folder / "evaluation.json").write_text(
        json.dumps({"steps": {HOSTILE: told}, "gate": HOSTILE}), encoding="utf-8"
    )
    found = results(method=HOSTILE, notices=[HOSTILE], versions={HOSTILE: HOSTILE})
    found["fallbacks"]["modules"][0]["what"] = HOSTILE
    found["calibration"]["tokens_per_language"] = {HOSTILE: 3}
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")
    rewrite(folder / "speed.json", machine={"cpu": HOSTILE, "cores": HOSTILE})
    text = page_of(folder)
    page = Page(text)
    assert page.problems == []
    assert page.all("script") == [] and len(page.all("style")) == 1
    assert "\x00" not in text and "\x1b" not in text and "\u202e" not in text
    assert "⟨U+202E⟩" in text and "␀" in text and "⟨U+D800⟩" in text and "{{ 7*7 }}" in page.text
    assert text.encode("utf-8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card and "\\<script\\>" in card


LOADS = ("src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href")


def test_a_page_loads_nothing(tmp_path):
    page_text = page_of(fill(tmp_path / "out"))
    page = Page(page_text)
    policy = next(a for a in page.all("meta") if "content-security-policy" in str(a).lower())
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attributes in page.tags:
        assert not set(attributes) & set(LOADS), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,")), (tag, attributes)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "img",
        "base",
    }
    assert not re.search(r"url\(|@import|@font-face", page_text)
    assert "://" not in page_text


def test_a_page_can_be_read_without_seeing_it(tmp_path):
    page = Page(page_of(fill(tmp_path / "out")))
    assert page.all("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    targets = {a["href"][1:] for a in page.all("a")}
    assert targets <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in a for a in page.all("th"))
    plots = [a for a in page.all("svg") if a.get("role") == "img"]
    assert plots and all(set(a["aria-labelledby"].split()) <= set(ids) for a in plots)
    hidden = [a for a in page.all("svg") if a.get("class", "").startswith("cell")]
    assert all(a["aria-hidden"] == "true" for a in hidden)


def test_right_to_left_samples(tmp_path):
    page = Page(page_of(fill(tmp_path / "out")))
    said = {a["lang"]: a["dir"] for a in page.all("p") if "lang" in a}
    assert said == {"sw": "ltr", "en": "ltr", "ar": "rtl"}


def test_store_keeps_names_and_renders(tmp_path):
    folder = fill(tmp_path / "out", "evaluation.json", "speed.json")
    value = {"steps": {"evaluate": evaluation(model="/srv/private/small", base="../big/dense")}}
    path = store(folder, "evaluation", value | {"gate": None})
    told = json.loads(path.read_text(encoding="utf-8"))["steps"]["evaluate"]
    assert (told["model"], told["base"]) == ("small", "dense")
    assert told["samples"] == evaluation()["samples"]
    assert "Swahili lost most" in (folder / "report.html").read_text(encoding="utf-8")
    store(folder, "speed", speed())
    assert "memory gives" in (folder / "report.html").read_text(encoding="utf-8")


def test_store_refuses(tmp_path):
    folder = fill(tmp_path / "out", "evaluation.json")
    with pytest.raises(InputError, match=r"evaluation.json of out is damaged at steps"):
        store(folder, "evaluation", {"steps": {}})
    odd = {"steps": {"evaluate": evaluation(more=float("nan"))}, "gate": None}
    with pytest.raises(InputError, match="no form for"):
        store(folder, "evaluation", odd)
    assert not (folder / "evaluation.json").exists()
    (folder / "recipe.yaml").write_text("model: x\n")
    with pytest.raises(InputError, match="not written by distaya"):
        store(folder, "speed", speed())


def test_links_of_an_earlier_step_are_not_written_through(tmp_path):
    folder = fill(tmp_path / "out")
    write_pages(folder)
    for name in ("report.html", "README.md"):
        os.link(folder / name, tmp_path / name)
    old = (tmp_path / "report.html").read_bytes()
    rewrite(folder / "results.json", method="gptq")
    write_pages(folder)
    assert (tmp_path / "report.html").read_bytes() == old != (folder / "report.html").read_bytes()
    assert (tmp_path / "README.md").read_bytes() != (folder / "README.md").read_bytes()


def test_a_curve_of_many_steps_is_thinned(tmp_path):
    folder = fill(tmp_path / "out")
    lines = "".join(f'{{"step": {i}, "loss": 0.5}}\n' for i in range(10_001))
    (folder / "metrics.jsonl").write_text(lines)
    assert 1000 < len(read(folder).losses) <= 2000


def test_templates_are_in_the_package():
    """The wheel takes every file of the package, so what is beside the code here is in it."""
    folder = resources.files("distaya_ext.report") / "templates"
    names = sorted(path.name for path in folder.iterdir())
    assert "report.html.j2" in names and "card.md.j2" in names and "style.css.j2" in names
    for path in folder.iterdir():
        assert path.read_text(encoding="utf-8").count("\n") < 300, path.name


def test_every_case_file_is_read():
    """The hand-made folder holds what our own writers write."""
    from distaya_ext.evaluate.result import LanguageResult

    fields = set(LanguageResult.__dataclass_fields__) | {"ppl"}
    assert set(report_case.evaluation()["languages"][0]) <= fields
