"""The table of bad inputs, continued: hostile text and YAML, outputs, what no code path does."""

import ast
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from damage import write
from speaking import SENTENCES
from strangers import INPUT, USAGE, both_refuse, compress, contents, distaya, one_sentence

import distaya_ext
from distaya_ext.compress.events import LayerDone, LayerStart
from distaya_ext.documents import MAX_LINE_BYTES
from distaya_ext.errors import InputError
from distaya_ext.export import export
from distaya_ext.recipe import Recipe

PACKAGE = Path(distaya_ext.__file__).parent


# ---- hostile text ----

TEXTS = {
    "NUL": ("ja.txt", "猫\n猫は\0\n".encode(), "ja.txt line 2, column 3 (byte 10", "NUL"),
    "no UTF-8": ("ja.txt", "猫\n猫x".encode() + b"\xff\n", "line 2, column 3 (byte 8", "0xff"),
    "cut in a character": ("en.txt", "caf\u00e9".encode()[:-1], "en.txt line 1, column 4", "0xc3"),
    "behind a mark": ("en.txt", b"\xef\xbb\xbfab\xff", "en.txt line 1, column 3 (byte 5", "0xff"),
    "UTF-16": ("en.txt", "cat\n".encode("utf-16"), "en.txt line 1, column 4 (byte 3", "NUL"),
    "no JSON": ("fr.jsonl", b'{"text": "a"}\n{"text" 1}\n', "fr.jsonl line 2", "at column 9"),
    "deep JSON": ("fr.jsonl", b"[" * 200_000 + b"\n", "fr.jsonl line 1", "JSON"),
    "NUL in JSON": ("fr.jsonl", b'{"text": "a\\u0000b"}\n', "fr.jsonl line 1", "NUL"),
    "half a pair": ("fr.jsonl", b'{"text": "a\\ud800b"}\n', "fr.jsonl line 1", "surrogate"),
    "no parquet": ("fr.parquet", b"PAR1" * 9, "fr.parquet", "parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_row_hostile_text_is_told_by_file_line_and_column(place, case):
    name, data, *words = TEXTS[case]
    write(name, data)(place / "texts")
    both_refuse(place, INPUT, *words)


def test_row_a_line_of_100_mb(place):
    """A real one (of a hole in the file, which takes no disk): refused by its length, in bounds."""
    path = place / "texts" / "en.txt"
    path.write_text("the cat\n")
    os.truncate(path, MAX_LINE_BYTES + 100)
    start = time.monotonic()
    one_sentence(compress(place), INPUT, "en.txt line 2", f"longer than {MAX_LINE_BYTES} bytes")
    assert time.monotonic() - start < 10 and not (place / "out").exists()


def test_row_marks_and_line_ends_of_windows_are_no_text(place):
    """A byte order mark and \\r\\n change nothing: the same weights, bit for bit."""
    lines = SENTENCES["ja"] * 8
    assert compress(place).exit_code == 0
    write("ja.txt", ("\ufeff" + "\r\n".join(lines) + "\r\n").encode())(place / "texts")
    assert compress(place, "--out", place / "again").exit_code == 0
    first, again = ((place / out / "model.safetensors").read_bytes() for out in ("out", "again"))
    assert first == again


def test_row_what_does_not_print_is_shown_as_its_escape(place):
    """A name with an escape sequence or a line end cannot reach the terminal as such."""
    (place / "r.yaml").write_text('model: m\n"\\e[2Jx\\ny\\u202e": 1\n')
    result = compress(place, "--recipe", place / "r.yaml")
    one_sentence(result, USAGE, r"\x1b[2Jx\ny\u202e")
    assert "\x1b" not in result.stderr


# ---- hostile YAML ----

DOUBLING = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [*%c, *%c]}\n" % (c, c, c - 1, c - 1) for c in range(ord("b"), ord("h"))
)
YAML = {
    "aliases": (b"a: &a [1]\nb: [" + b"*a, " * 40 + b"]\n", "more than 16 YAML aliases"),
    "doubling": (DOUBLING, "line 2, column 8: << copies"),
    "object": (
        b"model: !!python/object/apply:os.system ['touch x']\n",
        "line 1, column 8: the tag",
    ),
    "safe tag": (b"bits: !!int ''\n", "line 1, column 7: the tag"),
    "own tag": (b"model: !x m\n", "column 8: the tag '!x'"),
    "deep": (b"a: " + b"[" * 5000 + b"\n", "nested deeper than 16 levels"),
    "large": (b"# " + b"x" * (1 << 18), "larger than 262144 bytes"),
    "NUL": (b"model: m\nx: \0\n", "line 2, column 4"),
    "not UTF-8": (b"model: m\nx: \xff\n", "not UTF-8 at line 2, column 4"),
    "digits": (b"bits: " + b"9" * 5000 + b"\n", "value that is none"),
    "two documents": (b"bits: 4\n---\nbits: 3\n", "line 2, column 1"),
    "key twice": (b"bits: 4\nbits: 3\n", "'bits' is given twice"),
    "unknown key": (b"sparsty: 0.5\n", "'sparsity'"),
    "unknown inner key": (b"calibration: {token: 5}\n", "'tokens'"),
    "slow pattern": (b"skip: ['^([a-z0-9._]+)+!']\n", "skip pattern", "repeats a group"),
    "slow rule": (b"modules: [{match: '" + b".*" * 9 + b"x', bits: 4}]\n", "more than 5 repet"),
    "broken pattern": (b"skip: ['" + b"(" * 5000 + b"']\n", "not a regular expression"),
    "pattern of digits": (b"skip: ['a{99999999999}']\n", "not a regular expression"),
    "key that is no text": (b"evaluate: {yes: 1}\n", "evaluate has the key True"),
}


@pytest.mark.parametrize("case", YAML)
def test_row_yaml_bombs_tags_and_unknown_keys(place, case):
    data, *words = YAML[case]
    write("r.yaml", data)(place)
    before, start = contents(place), time.monotonic()
    one_sentence(compress(place, "--recipe", place / "r.yaml"), USAGE, "r", *words)
    assert contents(place) == before and time.monotonic() - start < 5


def test_row_a_recipe_cannot_say_where_to_write(place):
    for key in ("out", "output", "path"):
        write("r.yaml", f"{key}: ../../elsewhere\n".encode())(place)
        one_sentence(compress(place, "--recipe", place / "r.yaml"), USAGE, repr(key))


# ---- outputs ----


def _occupied(place):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("mine")


def _pretending(place):
    """Marked as ours by a link to a recipe of ours elsewhere."""
    _occupied(place)
    (place / "ours.yaml").write_text("# distaya_ext recipe, version 0\n")
    (place / "out" / "recipe.yaml").symlink_to(place / "ours.yaml")


def _link(place):
    (place / "real").mkdir()
    (place / "out").symlink_to("real")


OUTPUTS = {
    "not empty": (_occupied, [], ["out is not empty", "--overwrite an older result"]),
    "not ours": (_occupied, ["--overwrite"], ["not written by distaya", "not overwritten"]),
    "ours by a link": (_pretending, ["--overwrite"], ["not written by distaya"]),
    "a link": (_link, ["--overwrite"], ["out exists and is not a folder"]),
    "a link to nothing": (
        lambda place: (place / "out").symlink_to("nothing"),
        ["--overwrite"],
        ["out exists and is not a folder"],
    ),
    "a file": (write("out", b"mine"), ["--overwrite"], ["out exists and is not a folder"]),
    "below a file": (write("f", b""), ["--out", "f/out"], ["cannot be made"]),
    "the model": (
        lambda place: None,
        ["--out", "model", "--overwrite"],
        ["the model folder itself"],
    ),
    "above the model": (lambda place: None, ["--out", ".", "--overwrite"], ["holds the model"]),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_row_outputs_that_are_not_overwritten(place, case, monkeypatch):
    prepare, flags, words = OUTPUTS[case]
    prepare(place)
    monkeypatch.chdir(place)
    before = contents(place)
    one_sentence(compress(place, *flags), INPUT, *words)
    assert contents(place) == before


def run_and(place, act, *, on_other=lambda event: None, **options):
    """compress() of the healthy model; act() is called when the first layer is done."""
    pending = [act]

    def on_event(event):
        on_other(event)
        if isinstance(event, LayerDone) and pending:
            pending.pop()()

    recipe = Recipe(model="model", method="magnitude", sparsity=0.5)
    return distaya_ext.compress(
        place / "model", place / "out", recipe, on_event=on_event, **options
    )


def test_row_a_folder_that_appears_during_the_run_is_not_lost(place):
    """Without --overwrite and with it: what is not ours stays, and so do the layers done so far."""
    for options, words in (({}, "is not empty"), ({"overwrite": True}, "not written by distaya")):
        with pytest.raises(InputError, match=words):
            run_and(place, lambda: _occupied(place), **options)
        assert contents(place / "out") == {place / "out" / "mine.txt": b"mine"}
        shutil.rmtree(place / "out")
        done = []
        run_and(place, lambda: None, on_other=done.append, **options)  # the same run goes on
        assert not [event for event in done if isinstance(event, LayerStart)]
        shutil.rmtree(place / "out")


def test_row_a_folder_that_appears_during_an_export_is_not_lost(place):
    """Commands without a journal keep the finished model beside, and say where."""
    rtn = ("compress", place / "model", "--out", place / "packed", "--method", "rtn", "--bits", 4)
    assert distaya(*rtn).exit_code == 0
    with pytest.raises(InputError, match="finished model is kept in") as caught:
        export(
            place / "packed",
            place / "out",
            to="dense",
            on_module=lambda done, total, name: done == 1 and _occupied(place),
        )
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert (kept / "model.safetensors").is_file() and (kept / "config.json").is_file()
    assert contents(place / "out") == {place / "out" / "mine.txt": b"mine"}


def test_row_a_link_that_appears_during_the_run_is_not_followed(place):
    (place / "theirs").mkdir()
    (place / "theirs" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        run_and(place, lambda: (place / "out").symlink_to("theirs"), overwrite=True)
    assert contents(place / "theirs") == {place / "theirs" / "mine.txt": b"mine"}


def test_row_links_inside_an_older_result_are_not_followed(place):
    """Neither written through nor read: a README that is a link would show a private file."""
    assert compress(place).exit_code == 0
    (place / "private").write_text("private")
    for name in ("README.md", "results.json", "model.safetensors"):
        (place / "out" / name).unlink(missing_ok=True)
        (place / "out" / name).symlink_to(place / "private")
    os.link(place / "out" / "layers.csv", place / "hard")
    hard = (place / "hard").read_bytes()
    assert compress(place, "--overwrite", "--bits", 4, "--sparsity", "2:4").exit_code == 0
    assert (place / "private").read_text() == "private" and (place / "hard").read_bytes() == hard
    assert not any(path.is_symlink() for path in (place / "out").rglob("*"))
    assert all(path.read_bytes() != b"private" for path in (place / "out").iterdir())
    assert json.loads((place / "out" / "results.json").read_text())["method"]


# ---- what no code path does ----


def calls(tree: ast.AST):
    """(name of what is called, its keywords) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name)
            name = f"{node.func.id}()" if plain else getattr(node.func, "attr", "")
            yield name, {k.arg: k.value for k in node.keywords}


def offences(text: str) -> list[str]:
    """What a source file does that could run a stranger's code."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        bad = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        found += [f"import {n}" for n in names if n.split(".")[0] in bad]
    for name, keywords in calls(tree):
        trusted = keywords.get("trust_remote_code")
        if trusted is not None and not (
            isinstance(trusted, ast.Constant) and trusted.value is False
        ):
            found.append(f"trust_remote_code in {name}")
        if name in ("from_pretrained", "from_config") and trusted is None:
            found.append(f"{name} without trust_remote_code=False")
        if name in ("eval()", "exec()", "unsafe_load", "full_load"):
            found.append(name)
    wanted = ("torch.load(", "torch.save(", "yaml.Loader", "yaml.UnsafeLoader", "allow_pickle=True")
    return found + [words for words in wanted if words in text]


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from dill import loads", "A.from_pretrained(x)", "torch.load(x)",
     "A.from_pretrained(x, trust_remote_code=True)", "A.from_config(c, trust_remote_code=flag)",
     "eval(x)", "np.load(x, allow_pickle=True)"],
)  # fmt: skip
def test_the_scan_sees(code):
    assert offences(code)


def test_row_no_code_path_trusts_remote_code_or_opens_a_pickle():
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 100
    found = {str(p.relative_to(PACKAGE)): offences(p.read_text(encoding="utf-8")) for p in sources}
    assert {name: what for name, what in found.items() if what} == {}
