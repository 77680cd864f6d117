"""Which way a teacher's knowledge can take to a student: by tokens, by bytes, or by text."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from ..errors import UsageError
from .align import Vocabulary, align
from .spec import LossSpec, TrainSpec

# Scripts that tokenizers normalise, drop or split within a character; half of it must be readable.
_PROBE = (
    "The router sends 3 packets.\n  A second line, indented.",
    "Füge die Datei hinzu: große Änderungen, naïve façade.",
    "数据库里没有记录。東京は雨です。 서버가 꺼졌습니다.",
    "الخادم يعمل الآن. השרת פועל. सर्वर चालू है।",
    "Сервер працює; Ελληνικά γράμματα, tiếng Việt 👩‍👩‍👧.",
)

# Less of CE overfits a small text less; without it the tokens inside a span learn too little. Of
# tries at 0, 0.3 and 1 with one seed on texts of 6 and 8 languages this was best, 0.3 and 1 close.
_WEIGHTS = {"ce": 0.3, "spans": 1.0}


class Route(NamedTuple):
    """name, the sentence to say aloud (None: nothing is remarkable), and the loss's weights."""

    name: Literal["logits", "spans", "sequence"]
    sentence: str | None
    loss: LossSpec


def same_tokenizer(teacher: Any, student: Any) -> bool:
    """Whether every text gets the same ids from both: one vocabulary, and one way to split."""
    if teacher is student:
        return True
    if teacher.get_vocab() != student.get_vocab():
        return False
    probe = {"add_special_tokens": False, "verbose": False}
    return all(
        teacher(text, **probe)["input_ids"] == student(text, **probe)["input_ids"]
        for text in _PROBE
    )


def choose_route(teacher_tokenizer: Any, student_tokenizer: Any, spec: TrainSpec) -> Route:
    """How to distil between two tokenizers.

    "logits"    they are the same: token-wise distributions and hidden states can be compared
    "spans"     they differ, and the bytes of every token are known: probabilities of byte-aligned
                spans (train/spans.py)
    "sequence"  they differ and the bytes of one are unknown: text the teacher writes
                (train/sequence.py)

    UsageError where the spec asks by name for a loss that is undefined between the two.
    """
    loss = spec.loss
    if same_tokenizer(teacher_tokenizer, student_tokenizer):
        if loss.spans:
            raise UsageError(
                "the loss of spans is for different tokenizers, and these are the same; "
                "use kl, which compares every token"
            )
        return Route("logits", None, loss)
    sizes = f"{len(teacher_tokenizer)} and {len(student_tokenizer)} tokens"
    asked = [
        name
        for name in ("kl", "cosine", "mse")
        if name in loss.model_fields_set and getattr(loss, name)
    ]
    if asked:
        raise UsageError(
            f"{' and '.join(asked)} of token by token comparison is undefined between different "
            f"tokenizers ({sizes}): position t is not the same text in both; leave it out, and "
            "spans that both share are compared instead"
        )
    why = _unreadable(teacher_tokenizer, student_tokenizer)
    if why is None:
        weights = {"ce": loss.ce, "spans": loss.spans} if loss.spans else dict(_WEIGHTS)
        return Route(
            "spans",
            f"the tokenizers differ ({sizes}), so spans of bytes that both share are compared, "
            f"not tokens: ce {weights['ce']:g}, spans {weights['spans']:g}",
            loss.model_copy(update={"kl": 0.0, "cosine": 0.0, "mse": 0.0, **weights}),
        )
    if loss.spans:
        raise UsageError(f"spans cannot be compared: {why}")
    return Route(
        "sequence",
        f"the tokenizers differ ({sizes}) and {why}, so the student learns text that the teacher "
        "writes",
        loss.model_copy(update={"ce": 1.0, "kl": 0.0, "cosine": 0.0, "mse": 0.0, "spans": 0.0}),
    )


def _unreadable(teacher_tokenizer: Any, student_tokenizer: Any) -> str | None:
    """Why the bytes of the tokens cannot be compared; None when they can."""
    sides = {"teacher": Vocabulary(teacher_tokenizer), "student": Vocabulary(student_tokenizer)}
    for name, vocabulary in sides.items():
        if vocabulary.kind is None:
            return f"the bytes behind the {name}'s tokens are unknown"
    found = sum(align(text, *sides.values()) is not None for text in _PROBE)
    if 2 * found < len(_PROBE):
        return f"the two read the same bytes in only {found} of {len(_PROBE)} sample texts"
    return None
