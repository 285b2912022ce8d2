"""Corpus TER, the translation edit rate, by the search that tercom 7.25 makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_prefix.metrics.edit_distance import Alignment, EditDistance
from hf_prefix.metrics.rows import check_rows

_LONGEST_SHIFT = 10
"""Most words that tercom moves at once."""

_FARTHEST_SHIFT = 50
"""Most words that it moves them past."""

_IN_FRONT = -1


@dataclass(frozen=True)
class TerScore:
    """A corpus TER and what it was made of.

    Attributes:
        score: Edits per reference word; 0 is best, and it may exceed 1.
        edits: Insertions, deletions, substitutions and shifts, to each row's closest reference.
        reference_length: Sum over the rows of the mean length of their references, in words.
    """

    score: float
    edits: int
    reference_length: float


@dataclass(frozen=True)
class _Shift:
    """Moves words[start : end + 1] behind the word at `target`, or to the front."""

    start: int
    end: int
    target: int

    def apply(self, words: Sequence[str]) -> list[str]:
        moved, rest = words[self.start : self.end + 1], [*words[: self.start], *words[self.end + 1 :]]
        # Positions behind the moved words come closer; those within them count from their start.
        place = self.target + 1 if self.target < self.start else self.target + 1 - len(moved)
        if self.start <= self.target <= self.end:
            place = self.target
        return [*rest[:place], *moved, *rest[place:]]


def corpus_ter(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> TerScore:
    """Scores texts by TER (Snover et al. 2006) regardless of case; words stand between white space.

    Moving words that match the reference elsewhere counts as one edit. Which shifts are tried, and in which order,
    follows tercom: greedily the shift that saves most, among equal ones the longest and then the first.

    Args:
        hypotheses: One generated text per row; an empty one needs as many edits as its reference has words.
        references: Per row its reference texts, at least one; absent ones are left out.

    Raises:
        DataError: There are no rows, the numbers of rows differ, or a row has no or an empty reference.
    """
    check_rows("TER", hypotheses, references)
    edits, length = 0, 0.0
    for text, row in zip(hypotheses, references, strict=True):
        words = text.lower().split()
        targets = [reference.lower().split() for reference in row]
        edits += min(count_edits(words, target) for target in targets)
        length += sum(map(len, targets)) / len(targets)
    return TerScore(edits / length, edits, length)


def count_edits(words: Sequence[str], reference: Sequence[str]) -> int:
    """Returns how many edits make a text its reference.

    Args:
        words: Words of the text.
        reference: Words of the reference, at least one.
    """
    distance = EditDistance(reference)
    places = _places(reference)
    shifts, current = 0, list(words)
    remaining = distance(current)
    while remaining:
        alignment = distance.align(current)
        best, shifted = _best_shift(current, remaining, _shifts(current, places, alignment), distance)
        # A shift is an edit itself, so it has to save at least one; saving just one does no harm.
        if remaining - best < 1:
            break
        shifts, current, remaining = shifts + 1, shifted, best
    return shifts + remaining


def _best_shift(
    words: list[str], remaining: int, shifts: list[list[_Shift]], distance: EditDistance
) -> tuple[int, list[str]]:
    """Returns the distance after the shift that leaves least, and the words; `remaining` and `words` if none helps."""
    best, best_words = remaining, words
    for length in range(len(shifts), 0, -1):
        tried: set[tuple[str, ...]] = set()
        for shift in shifts[length - 1]:
            # A shift of so many words mends at most twice as many errors.
            if remaining - best >= 2 * length:
                return best, best_words
            shifted = shift.apply(words)
            if (key := tuple(shifted)) in tried:
                continue
            tried.add(key)
            left = distance(shifted)
            if left < best:
                best, best_words = left, shifted
    return best, best_words


def _places(reference: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    """Returns where each sequence of words in the reference starts."""
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for start in range(len(reference)):
        for end in range(start + 1, min(start + _LONGEST_SHIFT, len(reference)) + 1):
            places[tuple(reference[start:end])].append(start)
    return places


def _shifts(words: list[str], places: dict[tuple[str, ...], list[int]], alignment: Alignment) -> list[list[_Shift]]:
    """Returns the shifts that tercom tries, by length: of wrong words, to a place that is wrong."""
    found: list[list[_Shift]] = [[] for _ in range(min(_LONGEST_SHIFT, len(words)))]
    for start in range(len(words)):
        for end in range(start, min(start + _LONGEST_SHIFT, len(words))):
            sources = places.get(tuple(words[start : end + 1]))
            if sources is None:
                break
            if not any(alignment.wrong_words[start : end + 1]):
                continue
            reachable = [place for place in sources if _is_reachable(alignment.partners[place], start, end)]
            if not reachable:
                break
            for place in reachable:
                found[end - start].extend(_targets(place, start, end, alignment))
    return found


def _is_reachable(partner: int, start: int, end: int) -> bool:
    return not start <= partner <= end and abs(partner - start) <= _FARTHEST_SHIFT


def _targets(place: int, start: int, end: int, alignment: Alignment) -> Iterator[_Shift]:
    """Yields shifts of the words to where words of the same sequence in the reference, at `place`, are aligned to."""
    partners = alignment.partners
    if not any(alignment.wrong_reference[place : place + end - start + 1]):
        return
    for offset in range(-1, end - start + 1):
        if offset == -1 and place == 0:
            yield _Shift(start, end, _IN_FRONT)
            continue
        target = partners[place + offset]
        if target != start and (offset == 0 or target != partners[place]):
            yield _Shift(start, end, target)
