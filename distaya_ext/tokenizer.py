"""The model's tokenizer: loaded strictly, and the few ways compression and evaluation use it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .errors import InputError

# What holds a vocabulary. Each entry is a set of files that must stand together.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
)
VOCABULARY_FILES = tuple(name for names in _VOCABULARIES for name in names)


# Everything that decides which tokens a text becomes.
_DECIDES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip


def fingerprint(folder: Path) -> str:
    """BLAKE2b-128 of the tokenizer's files, their names included, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _DECIDES:
        if (folder / name).is_file():
            held = (folder / name).read_bytes()
            digest.update(f"{name} {len(held)}\n".encode() + held)
    return digest.hexdigest()


def load_tokenizer(folder: Path, rows: int) -> Any:
    """The tokenizer of a model whose embedding has `rows` rows.

    InputError when the folder holds no vocabulary (transformers would make up an empty one), when
    transformers cannot read it, or when it is not the model's: a token or a BOS, EOS or PAD mark
    that the embedding has no row for. Tokens added beyond the vocabulary proper may lie outside
    (Gemma 3 names an image token one past the embedding of its text models); should a text use
    one, check_rows tells.
    """
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        wanted = " or ".join(" with ".join(names) for names in _VOCABULARIES)
        raise InputError(f"the model folder {folder.name} has no tokenizer; it needs {wanted}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        encode(tokenizer, ["a b"])  # some settings are looked at only now
    except Exception as error:  # many kinds, depending on which file is broken
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines)[:300] or type(error).__name__
        raise InputError(f"the tokenizer of {folder.name} cannot be read: {reason}") from error
    added = tokenizer.get_added_vocab()
    proper = [number for token, number in tokenizer.get_vocab().items() if token not in added]
    if not proper:
        raise InputError(f"the tokenizer of {folder.name} has an empty vocabulary")
    check_rows(max(proper), rows, f"the tokenizer of {folder.name} goes up to token")
    for mark in ("bos_token", "eos_token", "pad_token"):
        number = getattr(tokenizer, f"{mark}_id")
        if number is not None:
            check_rows(number, rows, f"the {mark} of the tokenizer of {folder.name} is token")
    return tokenizer


def check_rows(token: int, rows: int, where: str) -> None:
    """InputError, beginning with `where`, when the embedding has no row for a token."""
    if not 0 <= token < rows:
        raise InputError(
            f"{where} {token}, but the model's embedding has {rows} rows; "
            "the tokenizer is not the model's"
        )


def encode(tokenizer: Any, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, without any special token."""
    return tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]


def separator(tokenizer: Any) -> list[int]:
    """What stands before each document in a stream: BOS, for want of it EOS, for want of both
    nothing.

    BOS is what a language model met at the start of a document in training. EOS is, in chat models,
    the end of a turn: nano-aya never saw it, and it costs 21 nats wherever it is put (measured).
    """
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [mark for mark in marks if mark is not None][:1]


def check_tokenised(lang: str, tokens: int, characters: int) -> None:
    """InputError when a language's text became no token (a vocabulary that drops its script)."""
    if characters and not tokens:
        raise InputError(
            f"the tokenizer turns {characters} characters of {lang} into no token at all; "
            "is it the model's?"
        )
