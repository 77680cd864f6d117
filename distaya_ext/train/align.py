"""Two tokenizers on one text: which bytes each token stands for, and the spans they share.

A span lies between two consecutive byte positions at which tokens of both tokenizers end: the
finest division of the text that both can express. Within it the teacher has tokens [a, b) and the
student [c, d).
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tokenizer import encode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
_ROUNDS = 3  # a text is a fixed point of NFC, NFKC, prefixed spaces... after one or two


@functools.cache
def _letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte, GPT-2's table: printable bytes are
    themselves, the others follow from U+0100 on in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


@functools.cache
def _names() -> list[str]:
    """The letter of each byte."""
    return sorted(_letters(), key=_letters().__getitem__)


class Vocabulary:
    """The bytes behind every token of a tokenizer.

    strings[id] is None for tokens that stand for no fixed bytes (unknown) and for ids without a
    token. kind: "bytes" for byte-level BPE, "pieces" for sentencepiece's marks (with <0x41> for
    single bytes), None for every other tokenizer: all strings are None then.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.kind = _kind(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.strings: list[bytes | None] = [None] * (1 + max(vocabulary.values(), default=-1))
        if self.kind is None:
            return
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        unknown = getattr(tokenizer, "unk_token", None)
        read = _from_letters if self.kind == "bytes" else _from_piece
        for token, number in vocabulary.items():
            if token != unknown:
                self.strings[number] = token.encode() if token in added else read(token)

    def pieces(self, text: str) -> tuple[list[int], bytes, np.ndarray] | None:
        """Token ids of a text, the bytes they stand for together, and where each ends in those,
        int64 [tokens]. None where a token stands for no fixed bytes.

        A space that sentencepiece puts before the text is not counted: its first token is one byte
        shorter then (and stands for none, when the space is all of it).
        """
        ids = encode(self.tokenizer, [text])[0]
        parts = [self.strings[i] if i < len(self.strings) else None for i in ids]
        if any(part is None for part in parts):
            return None
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        whole = b"".join(parts)
        if self.kind == "pieces" and whole == b" " + text.encode():
            lengths[0] -= 1
            whole = whole[1:]
        return ids, whole, np.cumsum(lengths)

    def write(self, string: bytes) -> list[int]:
        """The ids with which the tokenizer's own merges write some bytes within a word; [] where
        they cannot.
        """
        if self.kind == "bytes":
            letters = _names()
            word = "".join(letters[byte] for byte in string)
        else:
            try:
                word = string.decode().replace(" ", _SPACE)
            except UnicodeDecodeError:
                return []
        ids = [token.id for token in self.tokenizer.backend_tokenizer.model.tokenize(word)]
        parts = [self.strings[i] for i in ids]
        return ids if None not in parts and b"".join(parts) == string else []


def _kind(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    parts = json.loads(backend.decoder.__getstate__())
    steps = parts["decoders"] if parts["type"] == "Sequence" else [parts]
    if any(step["type"] == "ByteLevel" for step in steps):
        return "bytes"
    spaces = any(
        step["type"] == "Metaspace"
        or (step["type"] == "Replace" and step["pattern"].get("String") == _SPACE)
        for step in steps
    )
    return "pieces" if spaces else None


def _from_letters(token: str) -> bytes | None:
    table = _letters()
    return bytes(table[letter] for letter in token) if all(c in table for c in token) else None


def _from_piece(token: str) -> bytes:
    single = _BYTE.fullmatch(token)
    return bytes([int(single[1], 16)]) if single else token.replace(_SPACE, " ").encode()


@dataclass(frozen=True)
class Aligned:
    """One text in both tokenizers: ids, and spans int64 [n, 4] of (a, b, c, d).

    data is the text in bytes as both tokenizers read it (after NFC, if they normalise), ends
    int64 [n] the bytes at which the spans end.
    """

    teacher: list[int]
    student: list[int]
    spans: np.ndarray
    data: bytes
    ends: np.ndarray


def spans(teacher: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(spans int64 [n, 4], ends int64 [n]) from the bytes at which each tokenizer's tokens end.

    teacher and student: int64 [tokens], never falling, with the same last value (ValueError
    otherwise). Tokens of no bytes belong to the span that ends with them, at the start of the text
    to the first one.
    """
    if len(teacher) != 0 != len(student) and teacher[-1] != student[-1]:
        raise ValueError(f"one text of {teacher[-1]} and {student[-1]} bytes")
    ends = np.intersect1d(teacher, student)
    ends = ends[ends > 0]
    after = [np.searchsorted(side, ends, side="right") for side in (teacher, student)]
    before = [np.concatenate([[0], side])[:-1] for side in after]
    table = np.stack([before[0], after[0], before[1], after[1]], axis=1)
    return table.astype(np.int64), ends


def align(text: str, teacher: Vocabulary, student: Vocabulary) -> Aligned | None:
    """A text in both tokenizers with the spans they share, or None where they read different bytes
    or a token stands for none.

    Tokenizers may normalise (NFC, NFKC, spaces): the text is then replaced by what they read it as
    and tokenised again, until both read the same.
    """
    for _ in range(_ROUNDS):
        left, right = teacher.pieces(text), student.pieces(text)
        if left is None or right is None or not left[0] or not right[0]:
            return None
        if left[1] == right[1]:
            table, ends = spans(left[2], right[2])
            return Aligned(left[0], right[0], table, left[1], ends)
        try:
            read = left[1].decode()
            text = read if read != text else right[1].decode()
        except UnicodeDecodeError:
            return None
    return None
