"""Chats as token ids, with the assistant's own tokens marked: those that are learnt."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..documents import SUFFIXES, json_reason, read_lines
from ..errors import InputError
from ..weighting import LANGUAGE

_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
UNKNOWN = "und"  # language code of a file that is not named by one


@dataclass
class Chats:
    """ids [row][token] and learnt [row][token] (True: the assistant says it), in file order."""

    ids: list[list[int]] = field(default_factory=list)
    learnt: list[list[bool]] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def chat_files(texts: Any) -> list[Path]:
    """The chat files that texts names: itself, or all .jsonl files of a folder; [] for plain text.

    InputError for a folder that holds both.
    """
    if isinstance(texts, Mapping):
        return []
    root = Path(os.fspath(texts))
    if root.is_file():
        if root.suffix != ".jsonl" or not _is_chat(root):
            raise InputError(
                f"{root} is a file without chats; give a folder of <lang>.txt, .jsonl or .parquet, "
                'or a .jsonl file of objects with "messages"'
            )
        return [root]
    if not root.is_dir():
        return []
    shown = [p for p in sorted(root.iterdir()) if p.is_file() and not p.name.startswith(".")]
    chats = [p for p in shown if p.suffix == ".jsonl" and _is_chat(p)]
    plain = [p for p in shown if p.suffix in SUFFIXES and p not in chats]
    if chats and plain:
        raise InputError(
            f"{root} holds chats ({chats[0].name}) and plain text ({plain[0].name}); keep them in "
            "two folders"
        )
    return chats


def _is_chat(path: Path) -> bool:
    """Whether the first line that is not blank is an object with "messages"."""
    for _, line in read_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return False
            return isinstance(record, dict) and "messages" in record
    return False


def read_chats(files: list[Path], tokenizer: Any, window: int) -> Chats:
    """Every conversation of the files, cut behind `window` tokens.

    One in which the assistant says nothing before the cut is left out, which the notes tell.
    InputError, with file and line, for what is no conversation and for a template that refuses it.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{files[0]} holds chats and the tokenizer has no chat template to write them with; "
            "use one that has, or give plain text"
        )
    chats, cut, mute = Chats(), 0, 0
    for path in files:
        lang = path.stem if LANGUAGE.fullmatch(path.stem) else UNKNOWN
        for number, line in read_lines(path):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            ids, learnt = _marked(_messages(line, where), tokenizer, where)
            cut += len(ids) > window
            ids, learnt = ids[:window], learnt[:window]
            if not any(learnt[1:]):
                mute += 1
                continue
            chats.ids.append(ids)
            chats.learnt.append(learnt)
            chats.languages.append(lang)
    if not chats.ids:
        raise InputError(
            f"{files[0]} gives nothing to learn: in {mute} chats the assistant says nothing within "
            f"{window} tokens"
        )
    if mute:
        chats.notes.append(
            f"chats left out, since the assistant says nothing in their first {window} tokens: "
            f"{mute}"
        )
    if cut:
        chats.notes.append(f"chats longer than {window} tokens, which were cut there: {cut}")
    return chats


def _messages(line: str, where: str) -> list[dict[str, str]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}{json_reason(error)}") from None
    found = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(found, list) or not found:
        raise InputError(f'{where} is not an object with a list of "messages"')
    messages = []
    for at, message in enumerate(found, 1):
        parts = message if isinstance(message, dict) else {}
        if not all(isinstance(parts.get(key), str) for key in ("role", "content")):
            raise InputError(f'{where} message {at} lacks a string "role" or "content"')
        messages.append({"role": parts["role"], "content": parts["content"]})
    return messages


def _marked(
    messages: list[dict[str, str]], tokenizer: Any, where: str
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says.

    The template marks them where it can ({% generation %}); else a turn of the assistant is what
    the conversation with it has beyond the one before it that asks for an answer.
    """
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the assistant speaks first, in answer to nothing")
    if _MARKED.search(str(tokenizer.chat_template)):
        found = _apply(tokenizer, messages, where, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    ids = list(_apply(tokenizer, messages, where)["input_ids"])
    learnt = [False] * len(ids)
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:at], where, add_generation_prompt=True)["input_ids"]
        after = _apply(tokenizer, messages[: at + 1], where)["input_ids"]
        if ids[: len(before)] != list(before) or ids[: len(after)] != list(after):
            raise InputError(
                f"{where}: under this chat template the conversation up to message {at + 1} does "
                "not begin the whole one, so the assistant's tokens cannot be told from the others"
            )
        learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, learnt


def _apply(tokenizer: Any, messages: list[dict[str, str]], where: str, **extra: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **extra)
    except Exception as error:  # templates are programs and raise what they like
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{where} does not fit the chat template: {lines[0]}") from error
