"""Which student to take, and why, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import InputError
from .facts import count_text

if TYPE_CHECKING:
    from .rows import Row

GUARD = 1.25  # times the bits per byte of the best candidate, in a student's worst language
UNKNOWN = 0.01  # share of unknown tokens in a language


@dataclass(frozen=True)
class Advice:
    """The student to take, why, and what would change the choice."""

    name: str
    reasons: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def recommend(rows: Sequence[Row], budget: int, least: int | None = None) -> Advice:
    """Fewest bits per byte before training, the mean over languages, among rows that fit.

    Left out are those that need more than GUARD times the bits of the best in some language, and
    those whose tokenizer does not know more than UNKNOWN of the tokens of one, unless all do.
    InputError when none fits, or none could be scored; least is then the size of the smallest
    shape that was tried.
    """
    fits = [row for row in rows if row.fits]
    if not fits:
        raise InputError(_none_fits(rows, budget, least))
    able = [row for row in fits if row.loss is not None]
    if not able:
        raise InputError(
            f"none of the {len(fits)} students that fit could be scored; {fits[0].name}: "
            f"{fits[0].error}"
        )
    guarded = {row.name: _guard(row, able) for row in able}
    sound = [row for row in able if guarded[row.name] is None]
    ranked = sorted(sound or able, key=lambda row: (row.loss.mean, row.facts.parameters, row.name))
    best = ranked[0]
    return Advice(best.name, _reasons(ranked, able, guarded, budget), _changes(best, ranked, able))


def excess(row: Row, able: Sequence[Row]) -> tuple[str, float]:
    """The language in which a row is furthest behind the best of all, and how many times."""
    best = {lang: min(r.loss.languages[lang] for r in able) for lang in row.loss.languages}
    ratios = {lang: bits / best[lang] for lang, bits in row.loss.languages.items()}
    return max(ratios.items(), key=lambda pair: (pair[1], pair[0]))


def _guard(row: Row, able: Sequence[Row]) -> str | None:
    """Why a row is left out, or None."""
    worst = max(row.tokenized.languages, key=lambda x: x.unknown)
    if worst.unknown > UNKNOWN:
        return f"{100 * worst.unknown:.1f} % of its tokens of {worst.language} are unknown to it"
    lang, ratio = excess(row, able)
    if ratio > GUARD:
        return f"in {lang} it needs {ratio:.2f} times the bits of the best"
    return None


def _none_fits(rows: Sequence[Row], budget: int, least: int | None) -> str:
    known = [row for row in rows if row.facts is not None and row.error is None]
    if not known and least is None:
        return f"no candidate can be read; {rows[0].name}: {rows[0].error}"
    small = min(known, key=lambda row: row.facts.parameters, default=None)
    what = f"no student fits into {count_text(budget)} parameters; the smallest found is "
    if small is None or (least is not None and least < small.facts.parameters):
        return f"{what}a shape cut out of the teacher with {least:,}"
    why = "" if small.facts.parameters > budget else ", and it is no smaller than the teacher"
    return f"{what}{small.name} with {small.facts.parameters:,}{why}"


def _reasons(
    ranked: Sequence[Row], able: Sequence[Row], guarded: dict[str, str | None], budget: int
) -> list[str]:
    best, sizes = ranked[0], ranked[0].facts
    reasons = [
        f"It fits: {sizes.parameters:,} of {budget:,} parameters, "
        f"{100 * (sizes.embedding + sizes.head) / sizes.parameters:.0f} % of them in the embedding"
        f"{' and the head' if sizes.head else ''}."
    ]
    languages = len(best.loss.bits)
    mean = f"{best.loss.mean:.3f} bits per byte as the mean over {languages} languages"
    if len(ranked) > 1:
        delta, span = ranked[1].loss.over(best.loss)
        low, high = span or (delta, delta)
        chance = "; that much may be chance" if low <= 0 else ""
        reasons.append(
            f"Before any training it needs {mean}, {delta:.3f} (95 %: {low:.3f} to {high:.3f}) "
            f"fewer than {ranked[1].name}, the next{chance}."
        )
    else:
        reasons.append(f"Before any training it needs {mean}; no other can be chosen.")
    lang, ratio = excess(best, able)
    worst, bits = best.loss.worst
    reasons.append(
        f"Its worst language is {worst} with {bits:.3f} bits per byte; it is furthest behind the "
        f"best of all in {lang}, {ratio:.2f} times ({GUARD:g} allowed)."
    )
    reasons += [
        f"{n} is passed over: {why}." for n, why in guarded.items() if why and n != best.name
    ]
    if guarded[best.name]:
        reasons.append(
            f"Every candidate fails the guard of the worst language; of {best.name}: "
            f"{guarded[best.name]}."
        )
    return [*reasons, *_tokenizer(best)]


def _tokenizer(row: Row) -> list[str]:
    found = []
    if row.same_tokenizer:
        found.append("It has the teacher's tokenizer, so logits can be matched token by token.")
    elif row.same_tokenizer is not None:
        found.append(
            "Its tokenizer is not the teacher's, so only byte-aligned spans or texts that the "
            "teacher writes can be learned from."
        )
    lossy = [x for x in row.tokenized.languages if x.lossless < 1]
    if lossy:
        least = min(lossy, key=lambda x: x.lossless)
        found.append(
            f"Its tokenizer does not give every line back in {len(lossy)} of "
            f"{len(row.tokenized.languages)} languages, least in {least.language} "
            f"({100 * least.lossless:.1f} % of the lines)."
        )
    return found


def _changes(best: Row, ranked: Sequence[Row], able: Sequence[Row]) -> list[str]:
    """What would lead to another choice."""
    changes = []
    smaller = [row for row in ranked if row.facts.parameters < best.facts.parameters]
    if smaller:
        changes.append(
            f"With fewer than {best.facts.parameters:,} parameters allowed it would be "
            f"{smaller[0].name} ({smaller[0].facts.parameters:,})."
        )
    if best.same_tokenizer is False:
        alike = [row for row in ranked if row.same_tokenizer]
        if alike:
            changes.append(
                f"To match the teacher's logits token by token, {alike[0].name} is the best "
                f"({alike[0].loss.mean:.3f} bits per byte)."
            )
    fast = min(able, key=lambda row: (row.flop_per_byte, row.name))
    if fast is not best and fast.flop_per_byte < best.flop_per_byte:
        share = fast.flop_per_byte / best.flop_per_byte
        changes.append(
            f"For speed, {fast.name} takes {share:.2f} times its work per byte of text, with "
            f"{fast.loss.mean:.3f} bits per byte."
        )
    changes.append(
        "Bits per byte before training say where training starts, not where it ends: of two that "
        "lie close, a short run of distill on both decides."
    )
    return changes
