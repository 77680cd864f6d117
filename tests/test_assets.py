"""The shipped assets are what their READMEs say: the demo model and the parallel texts."""

import json
import math
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import distaya_ext

ASSETS = Path(distaya_ext.__file__).parent / "assets"
MODEL = ASSETS / "nano-aya"
TEXTS = ASSETS / "texts"
SPLITS = ("calibration", "evaluation")

# First word of a letter's Unicode name, for the scripts a file is mostly written in.
SCRIPTS = {
    "zh": {"CJK"},
    "ja": {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"},
    "ko": {"HANGUL"},
    "ar": {"ARABIC"},
    "fa": {"ARABIC"},
    "he": {"HEBREW"},
    "hi": {"DEVANAGARI"},
    "el": {"GREEK"},
    "ru": {"CYRILLIC"},
    "uk": {"CYRILLIC"},
}
# Frequent short words that tell languages of the same script apart.
MARKERS = {
    "en": "the and of is it to",
    "cs": "se je si na které aby",
    "nl": "het een de en van je",
    "fr": "le la les des et une",
    "de": "der die und das ist nicht",
    "id": "yang dan dari untuk itu di",
    "it": "il di che un è per",
    "pl": "się jest na nie że do",
    "pt": "o os um uma não em",
    "ro": "și să un este din pe",
    "es": "el los un una y en",
    "tr": "bir ve daha için çok onu",
    "vi": "của một và những có được",
    "ar": "من في إلى على أن لا",
    "fa": "را از به که در آن",
    "ru": "и в не на что его",
    "uk": "і в не та що його",
}
LATIN = set(MARKERS) - set(SCRIPTS)
LANGUAGES = tuple(sorted({*SCRIPTS, *MARKERS}))
EVERY_FILE = [(split, language) for split in SPLITS for language in LANGUAGES]


def read_lines(split: str, language: str) -> list[str]:
    """Return the passages of one file; the bytes must be strict UTF-8 with a final newline."""
    text = (TEXTS / split / f"{language}.txt").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def words(lines: list[str]) -> list[str]:
    """Return the lower-case words of `lines`, punctuation stripped."""
    return [word.strip(".,:;،'’").lower() for line in lines for word in line.split()]


# ---------------------------------------------------------------- nano-aya


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_model_config_is_cohere():
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["CohereForCausalLM"]
    assert config["model_type"] == "cohere"
    assert (config["num_hidden_layers"], config["hidden_size"]) == (8, 256)


def test_model_weights_open_and_count():
    count = 0
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert torch.isfinite(tensor).all(), name
            count += math.prod(tensor.shape)
    assert count == 8_128_768  # the model card's figure


def test_model_loads_completely_and_predicts(tokenizer):
    model, info = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(tokenizer) == model.config.vocab_size == 8192
    for language in LANGUAGES:
        ids = tokenizer("<BOS_TOKEN>" + read_lines("evaluation", language)[0]).input_ids
        batch = torch.tensor([ids])
        with torch.no_grad():
            loss = model(batch, labels=batch).loss.item()
        # A uniform guess costs ln 8192 = 9.01 nats; a trained model is far below it everywhere.
        assert loss < 6.5, (language, loss)


def test_model_card():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    front = card.split("---\n")[1]
    listed = front.split("language:\n")[1].split("\nlicense:")[0].splitlines()
    assert sorted(line.removeprefix("  - ") for line in listed) == list(LANGUAGES)
    assert "\nlicense: apache-2.0\n" in front and "\nlibrary_name: transformers\n" in front
    assert "8,128,768 parameters" in card
    assert "](.." not in card  # no link may leave the package


# ---------------------------------------------------------------- parallel texts


def test_there_are_23_languages_and_nothing_else():
    assert len(LANGUAGES) == 23
    for split in SPLITS:
        files = sorted(path.name for path in (TEXTS / split).iterdir())
        assert files == [f"{language}.txt" for language in LANGUAGES]


@pytest.mark.parametrize(("split", "language"), EVERY_FILE)
def test_file_form(split, language):
    lines = read_lines(split, language)
    assert len(lines) == 20
    for line in lines:
        assert line and line == line.strip()
        assert "  " not in line
        assert unicodedata.is_normalized("NFC", line)
        assert line.endswith(("。", "।") if language in ("zh", "ja", "hi") else ".")
        odd = {c for c in line if unicodedata.category(c)[0] == "C" or c == "\ufffd"}
        # Persian joins its suffixes with the zero-width non-joiner; nothing else is invisible.
        assert odd <= ({"\u200c"} if language == "fa" else set()), line


@pytest.mark.parametrize(("split", "language"), EVERY_FILE)
def test_script(split, language):
    letters = [c for line in read_lines(split, language) for c in line if c.isalpha()]
    found = Counter(unicodedata.name(c).split()[0] for c in letters)
    own = SCRIPTS.get(language, {"LATIN"})
    assert sum(found[name] for name in own) >= 0.99 * len(letters), found


@pytest.mark.parametrize("split", SPLITS)
def test_letters_that_tell_neighbours_apart(split):
    text = {language: "".join(read_lines(split, language)) for language in LANGUAGES}
    text["zh"].encode("gb2312")  # Simplified characters only: a traditional one raises
    assert not set(text["zh"]) & set(",.;:?!")
    kana = sum(unicodedata.name(c, "").startswith("HIRAGANA") for c in text["ja"])
    assert kana > 0.3 * len(text["ja"])
    assert set("ыэ") <= set(text["ru"]) and not set("іїєґ") & set(text["ru"])
    assert set("іїє") <= set(text["uk"]) and not set("ыэъё") & set(text["uk"])
    assert set("پچگکی") <= set(text["fa"]) and not set("كيىة") & set(text["fa"])
    assert set("كيىة") <= set(text["ar"]) and not set("پچژگکی") & set(text["ar"])
    assert set("șț") <= set(text["ro"]) and not set("şţ") & set(text["ro"])  # comma, not cedilla
    assert set("ığşİ") & set(text["tr"]) and set("ơưđ") <= set(text["vi"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("group", [LATIN, {"ar", "fa"}, {"ru", "uk"}], ids=["latin", "arab", "cyr"])
def test_frequent_words_name_the_language(split, group):
    for language in group:
        seen = Counter(words(read_lines(split, language)))
        votes = {other: sum(seen[w] for w in MARKERS[other].split()) for other in group}
        assert max(votes, key=votes.get) == language, votes


def test_no_passage_appears_twice():
    seen = Counter(line for split, language in EVERY_FILE for line in read_lines(split, language))
    assert len(seen) == 2 * 20 * 23
    sentences = Counter()
    for line in seen:
        sentences.update(
            part.strip() for part in line.replace("।", ".").replace("。", ".").split(".")
        )
    del sentences[""]
    assert max(sentences.values()) == 1, sentences.most_common(3)


@pytest.mark.parametrize(("split", "language"), EVERY_FILE)
def test_lengths_are_plausible(split, language):
    for english, line in zip(read_lines(split, "en"), read_lines(split, language), strict=True):
        assert 15 <= len(english.split()) <= 40
        assert 0.2 <= len(line) / len(english) <= 4.0, line


@pytest.mark.parametrize("split", SPLITS)
def test_translations_keep_the_order_of_passages(split):
    """Lengths of line i rise and fall together in all languages: a shifted file would not."""
    lengths = [[float(len(line)) for line in read_lines(split, name)] for name in LANGUAGES]
    rows = torch.tensor(lengths, dtype=torch.float64)
    rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    for index, language in enumerate(LANGUAGES):
        others = (rows.sum(0) - rows[index]) / (len(LANGUAGES) - 1)
        by_shift = [
            torch.corrcoef(torch.stack([rows[index].roll(shift), others]))[0, 1].item()
            for shift in range(20)
        ]
        assert by_shift[0] > 0.5 and by_shift[0] == max(by_shift), (language, by_shift)


def test_tokenizer_returns_every_passage(tokenizer):
    for split, language in EVERY_FILE:
        for line in read_lines(split, language):
            ids = tokenizer(line).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == line


def test_texts_readme_table(tokenizer):
    """The README's characters and tokens per language are the files' own."""
    readme = (TEXTS / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if line[:2] == "| "]
    table = {row[0]: row[3:] for row in rows if row[0] in LANGUAGES}
    assert sorted(table) == list(LANGUAGES)
    for language, figures in table.items():
        for split, at in (("calibration", 0), ("evaluation", 2)):
            lines = read_lines(split, language)
            tokens = sum(len(ids) for ids in tokenizer(lines).input_ids)
            characters = sum(len(line) for line in lines)
            assert figures[at : at + 2] == [f"{characters:,}", f"{tokens:,}"], language
