"""Whether an answer says what the file says: final answers taken out of texts and compared.

Knows texts. Does not know models, tokens or files.

GSM8K marks what counts with "####", MATH with \\boxed{…}; where neither stands, the last number of a text is its final
answer, and its last line where it has no number.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

MARK = "####"
_BOXED = "\\boxed{"
# with thousands in groups of three, or without: 1,234.5 and 1234.5, but 1,2 are two numbers
_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def final_answer(text: str) -> str | None:
    """What a text comes to, in a form that can be compared; None for a text that comes to nothing."""
    if MARK in text:
        # a text that goes on behind its answer has said it all the same
        text = text.rpartition(MARK)[2].strip().partition("\n")[0]
        return _normal(text) or None
    if _BOXED in text:
        return _normal(_inside(text.rpartition(_BOXED)[2])) or None
    if numbers := _NUMBER.findall(text):
        return _normal(numbers[-1])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _normal(lines[-1]) if lines else None


def is_right(said: str, known: str) -> bool:
    """Whether two texts come to the same; a text that comes to nothing is never right."""
    wanted = final_answer(known)
    return wanted is not None and final_answer(said) == wanted


def _inside(text: str) -> str:
    """Up to the brace that closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:place]
    return text


def _normal(text: str) -> str:
    """``$1,234.50.`` → ``1234.5``; what is no number in lower case and single spaces."""
    text = " ".join(text.strip().strip("$").rstrip(".%").split()).replace("−", "-")
    if _NUMBER.fullmatch(text):
        try:
            value = Decimal(text.replace(",", "")).normalize()
            return format(value if value else Decimal(0), "f")
        except InvalidOperation:
            return text
    return text.lower()
