"""The edit distance between words, and which words of both texts it aligns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Alignment:
    """How a text is aligned to its reference with the fewest insertions, deletions and substitutions.

    Attributes:
        wrong_words: For each word of the text whether it is inserted or substituted.
        wrong_reference: For each word of the reference whether it is missing or substituted.
        partners: For each word of the reference the position of its word in the text; of a missing one, that of
            the word before it, -1 at the start.
    """

    wrong_words: list[bool]
    wrong_reference: list[bool]
    partners: list[int]


class EditDistance:
    """Distances of texts to one reference.

    Args:
        reference: Its words, at least one.
    """

    def __init__(self, reference: Sequence[str]) -> None:
        self._reference = list(reference)
        self._positions: dict[str, int] = defaultdict(int)
        for position, word in enumerate(self._reference):
            self._positions[word] |= 1 << position

    def __call__(self, words: Sequence[str]) -> int:
        """Returns the distance of a text.

        A column of the usual table is two integers here, whose bits say where it goes up and down by one (Myers
        1999, in the form of Hyyrö 2001): the search of TER asks for thousands of distances, and only for the number.

        Args:
            words: Its words.
        """
        mask = (1 << len(self._reference)) - 1
        last = 1 << (len(self._reference) - 1)
        up, down, distance = mask, 0, len(self._reference)
        positions = self._positions
        for word in words:
            equal = positions.get(word, 0)
            vertical = equal | down
            horizontal = (((equal & up) + up) ^ up) | equal
            rises = down | ~(horizontal | up)
            falls = up & horizontal
            if rises & last:
                distance += 1
            elif falls & last:
                distance -= 1
            rises = (rises << 1) | 1
            up = ((falls << 1) | ~(vertical | rises)) & mask
            down = rises & vertical & mask
        return distance

    def align(self, words: Sequence[str]) -> Alignment:
        """Returns the alignment of a text; among equal ones it prefers matches and substitutions, then insertions.

        Args:
            words: Its words.
        """
        table = self._table(words)
        alignment = Alignment([True] * len(words), [True] * len(self._reference), [-1] * len(self._reference))
        row, column = len(words), len(self._reference)
        while row or column:
            equal = bool(row and column) and words[row - 1] == self._reference[column - 1]
            here = table[row][column]
            if row and column and table[row - 1][column - 1] + (not equal) == here:
                row, column = row - 1, column - 1
                alignment.partners[column] = row
                alignment.wrong_words[row] = alignment.wrong_reference[column] = not equal
            elif row and table[row - 1][column] + 1 == here:
                row -= 1
            else:
                column -= 1
                alignment.partners[column] = row - 1
        return alignment

    def _table(self, words: Sequence[str]) -> list[list[int]]:
        """Returns the distances of all beginnings of the text to all beginnings of the reference."""
        table = [list(range(len(self._reference) + 1))]
        for number, word in enumerate(words, start=1):
            above, row = table[-1], [number]
            for column, target in enumerate(self._reference, start=1):
                row.append(min(above[column - 1] + (word != target), above[column] + 1, row[-1] + 1))
            table.append(row)
        return table
