"""The forms in which the official scripts of WebNLG 2017 and DART compare texts."""

from __future__ import annotations

import re

_NON_WORD = re.compile(r"(\W)")


def split_non_words(text: str) -> str:
    """Makes every character that belongs to no word a token of its own; tokens stand between single spaces.

    Args:
        text: The text.
    """
    return " ".join(" ".join(_NON_WORD.split(text)).split())


def dart_form(text: str) -> str:
    """Returns a text as DART's reference files have it: non-word characters apart, lowercase.

    Args:
        text: A reference or a generated text; one that has this form already stays as it is.
    """
    return split_non_words(text).lower()


def webnlg_reference_form(text: str) -> str:
    """Returns a reference as the script of WebNLG 2017 compares it: as `dart_form`, and then ASCII.

    Args:
        text: The reference.

    Raises:
        ImportError: anyascii is not installed.
    """
    return _ascii(dart_form(text))


def webnlg_output_form(text: str) -> str:
    """Returns a generated text as the script of WebNLG 2017 compares it: ASCII, lowercase, non-word characters apart.

    The order differs from that of references, as in the script: of a fraction such as "½" three tokens are left.

    Args:
        text: The text.

    Raises:
        ImportError: anyascii is not installed.
    """
    return split_non_words(_ascii(text.strip()).lower())


def _ascii(text: str) -> str:
    try:
        from anyascii import anyascii
    except ImportError as error:
        raise ImportError(
            "WebNLG's scores need the package anyascii, which is missing: pip install anyascii"
        ) from error
    return str(anyascii(text))
