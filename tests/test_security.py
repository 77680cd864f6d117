"""SECURITY.md promises nothing that no test holds us to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
# A row of the table of bad inputs -> words in the name of its test.
ROWS = {
    "shard path above or absolute": "row_shard_path",
    "index without metadata": "row_index_without_metadata",
    "tensor absent in shard, or in no index": "row_index_promises|row_shard_holds",
    "missing shard": "row_missing_shards",
    "truncated, huge header, unknown dtype": "row_truncated|row_all_truncated",
    "wrong shape or dtype": "row_wrong_shape",
    "weights not finite": "row_weights_that_are_not_finite|row_there_is_no_way",
    "activations not finite": "row_a_window_that_overflows|row_too_many_windows",
    "pickles": "row_pickled|row_pickles",
    "remote code": "row_remote_code|row_kernels_named|row_no_code_path",
    "dead columns": "row_dead_columns",
    "rank-deficient": "row_too_few_tokens|row_hessians_of_rank_0",
    "documents": "row_texts_too_short|row_odd_documents",
    "tensors at the border": "row_tensors_that_cannot|row_arrays|row_nothing_gives_nothing",
    "odd columns": "row_columns_that_no_group|row_columns_that_no_pattern",
    "more than 2^31": "row_more_than_2_31",
    "threads": "row_concurrent",
    "fork": "row_a_forked_child",
    "Ctrl-C": "row_ctrl_c",
    "SIGKILL": "row_a_killed_run",
    "disk full": "row_a_full_disk",
    "changed run": "row_a_changed_run",
    "two runs": "row_two_runs",
    "tokenizer": "row_tokenizer|row_the_hash_of_the_tokenizer",
    "hostile text and YAML": "row_hostile_text|row_a_line_of_100_mb|row_yaml",
    "outputs": "row_outputs|row_a_link_that|row_a_recipe_cannot",
}


def source(pattern: str) -> str:
    found = sorted((ROOT / "tests").glob(pattern))
    assert found, pattern
    return "\n".join(path.read_text(encoding="utf-8") for path in found)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_table_is_a_test(row):
    for word in ROWS[row].split("|"):
        assert re.search(rf"^def test_{word}", source("test_bad_input_table*.py"), re.M), word


def test_no_row_is_forgotten():
    words = "|".join(ROWS.values())
    named = re.findall(r"^def test_(row_\w+)", source("test_bad_input_table*.py"), re.M)
    others = {name for name in named if not re.match(words, name)}
    assert len(named) > 40 and len(others) < 15, others


def test_the_tests_it_names_are_there():
    promises = re.findall(r"`(test_\w+\.py)`(?:: ((?:`[\w ]+`(?:, )?)+))?", TEXT)
    assert len(promises) > 15
    for file, names in promises:
        text = source(file)
        for name in re.findall(r"`([\w ]+)`", names):
            assert re.search(rf'def test_\w*{name}|"{name}|def {name}', text), (file, name)
    for tool in re.findall(r"`((?:tests|tools|\.ci)/[\w/.]+)`", TEXT):
        assert (ROOT / tool).exists(), tool
