"""Text the teacher writes, for students that can be taught in no closer way (Kim & Rush 2016).

The teacher continues prompts taken from the texts, and the student learns the continuations by
cross entropy. It is what is left where the tokenizers differ and the bytes behind one's tokens are
unknown: only text passes between the two then. choose_route says when.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compress.events import Notice
from ..documents import open_texts
from ..errors import InputError, UsageError
from ..ranks import by_all, by_first, team
from ..texts import windows
from ..tokenizer import encode
from .chat import chat_files
from .data import IGNORED, Texts, TrainingData, _split
from .spec import TrainSpec

BATCH = 16  # prompts continued at once
_BROKEN = "\ufffd"  # what half a character is decoded as


@dataclass(frozen=True)
class Written:
    """One prompt, what the teacher wrote after it, and their language."""

    language: str
    prompt: str
    text: str


def sequence_data(
    teacher: Any,
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    texts: Texts,
    spec: TrainSpec,
    cache: Path,
    *,
    temperature: float = 0.0,
    on_event: Callable[[Notice], None] | None = None,
) -> tuple[TrainingData, TrainingData | None]:
    """(training, held-out) rows of prompts and continuations; continuations alone are learnt.

    See write for the arguments, and data.from_texts for how rows are held out. Rows are cut to
    spec.window tokens of the student, which notes tell. InputError when the teacher wrote nothing
    that the student can read.
    """
    found = write(
        teacher, teacher_tokenizer, texts, spec, cache, temperature=temperature, on_event=on_event
    )
    bos = [] if student_tokenizer.bos_token_id is None else [student_tokenizer.bos_token_id]
    prompts, said = (
        encode(student_tokenizer, parts)
        for parts in ([one.prompt for one in found], [one.text for one in found])
    )
    rows = [(bos + asked, answer) for asked, answer in zip(prompts, said, strict=True)]
    kept = [i for i, (asked, answer) in enumerate(rows) if answer and len(asked) < spec.window]
    if not kept:
        raise InputError(
            f"none of {len(found)} continuations of the teacher fits a window of {spec.window} "
            "tokens of the student behind its prompt"
        )
    cut = sum(len(rows[i][0]) + len(rows[i][1]) > spec.window for i in kept)
    notes = []
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} of {len(rows)} continuations are empty or too long")
    if cut:
        notes.append(f"{cut} of {len(kept)} continuations are cut to {spec.window} tokens")
    ids = [torch.tensor((rows[i][0] + rows[i][1])[: spec.window]) for i in kept]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    labels = [row.clone() for row in ids]
    for row, i in zip(labels, kept, strict=True):
        row[: len(rows[i][0])] = IGNORED
    pad = torch.nn.utils.rnn.pad_sequence
    data = TrainingData(
        pad(ids, batch_first=True),
        pad(labels, batch_first=True, padding_value=IGNORED),
        pad(mask, batch_first=True),
        [found[i].language for i in kept],
        0,
        notes,
    )
    return _split(data, spec)


def write(
    teacher: Any,
    tokenizer: Any,
    texts: Texts,
    spec: TrainSpec,
    cache: Path,
    *,
    temperature: float = 0.0,
    on_event: Callable[[Notice], None] | None = None,
) -> list[Written]:
    """The teacher's continuations of prompts, kept in `cache`, a JSONL file.

    Windows of spec.window of the teacher's tokens are cut from the texts as for calibration (out of
    spec.tokens, by spec.quotas, seeded); the first quarter of each is the prompt, and as many
    tokens as the rest holds are written, or fewer where the teacher ends. temperature 0 takes the
    most probable token each time, above 0 samples with spec.seed.

    Ranks share the batches of prompts, rank 0 keeps the file, and all get the same text, whatever
    their number. A run that was stopped goes on behind the last whole batch and ends with the same
    text. InputError when the file holds what another teacher wrote or with other settings.
    """
    if temperature < 0:
        raise UsageError(f"the temperature is {temperature:g}, and must be 0 or above")
    if chat_files(texts):
        raise UsageError("the teacher continues plain text; chats cannot be continued by it")
    documents: Mapping[str, Iterable[str]] = (
        texts if isinstance(texts, Mapping) else open_texts(texts)
    )
    cut = windows(
        documents,
        tokenizer,
        tokens=spec.tokens,
        window=spec.window,
        seed=spec.seed,
        quotas=spec.quotas,
    )
    asked = max(1, spec.window // 4)
    prompts = cut.ids[:, :asked]
    more = spec.window - asked
    settings = {
        "prompts": _digest(prompts),
        "tokens": more,
        "temperature": temperature,
        "seed": spec.seed,
        "teacher": _sample(teacher),
    }
    lines = by_first(lambda: _begun(cache, settings))
    if on_event is not None:
        how = f"sampled at {temperature:g}" if temperature else "greedily"
        on_event(
            Notice(
                f"the teacher continues {len(prompts)} prompts of {asked} tokens by up to {more}, "
                f"{how}; {len(lines)} are there already"
            )
        )

    def batch(start: int) -> list[dict[str, str]]:
        rows = prompts[start : start + BATCH]
        if not len(rows):
            return []
        ids = _continue(teacher, rows, more, temperature, [spec.seed, start])
        languages = cut.languages[start : start + BATCH]
        return [
            {"language": lang, "prompt": prompt, "text": text}
            for lang, (prompt, text) in zip(languages, _texts(tokenizer, rows, ids), strict=True)
        ]

    us = team()
    with open(cache, "a", encoding="utf-8") if us.first else nullcontext() as file:
        for start in range(len(lines), len(prompts), BATCH * us.world):
            own = start + BATCH * us.rank
            for new in (line for of_rank in by_all(lambda own=own: batch(own)) for line in of_rank):
                lines.append(new)
                if file is not None:
                    file.write(json.dumps(new, ensure_ascii=False) + "\n")
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
    return [Written(**line) for line in lines]


@torch.no_grad()
def _continue(
    teacher: Any, prompts: torch.Tensor, more: int, temperature: float, seed: list[int]
) -> torch.Tensor:
    """ids [rows, up to L + more] of prompts [rows, L], the generators left as they were."""
    device = next(teacher.parameters()).device
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    end = teacher.generation_config.eos_token_id
    pad = teacher.generation_config.pad_token_id
    if pad is None and end is not None:
        pad = end if isinstance(end, int) else end[0]
    ids = prompts.to(device)
    digest = hashlib.sha256(repr(seed).encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        found = teacher.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=more,
            pad_token_id=pad,
            **(sampling if temperature else {"do_sample": False}),
        )
    return found.cpu()


def _texts(tokenizer: Any, prompts: torch.Tensor, ids: torch.Tensor) -> list[tuple[str, str]]:
    """(prompt, continuation) of each row, cut between whole characters."""

    def decode(row: torch.Tensor) -> str:
        text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip(_BROKEN)

    pairs = []
    for prompt, whole in zip(prompts, ids, strict=True):
        before, text = decode(prompt), decode(whole)
        # A prompt that ends in half a letter may compose with what follows; then all is told anew.
        pairs.append((before, text[len(before) :]) if text.startswith(before) else ("", text))
    return pairs


def _begun(cache: Path, settings: dict[str, Any]) -> list[dict[str, str]]:
    """The lines of whole batches that the file holds; it is cut behind them, or begun."""
    header = json.dumps(settings, sort_keys=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    if not cache.exists():
        cache.write_text(header + "\n", encoding="utf-8")
        return []
    first, *rest = cache.read_bytes().split(b"\n")[:-1] or [b""]
    if first != header.encode():
        raise InputError(
            f"{cache} holds text of another teacher, other prompts or other settings; remove it "
            "to have it written anew"
        )
    whole = rest[: len(rest) // BATCH * BATCH]
    partial = cache.with_name(cache.name + ".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in [first, *whole]))
    os.replace(partial, cache)
    return [json.loads(line) for line in whole]


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(repr(list(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()


def _sample(model: Any) -> str:
    """SHA-256 of 64 numbers of every weight: enough to tell teachers apart."""
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)].contiguous().cpu()
        found.update(f"{name}{list(tensor.shape)}".encode())
        found.update(some.view(torch.uint8).numpy())
    return found.hexdigest()
