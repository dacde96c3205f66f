"""Final answers: where they stand in a text, how numbers are written, and what is never right."""

from __future__ import annotations

import pytest

from accel.distill.checking import final_answer, is_right


@pytest.mark.parametrize(
    ("text", "comes_to"),
    [
        ("She has 3 * 4 = 12.\n#### 12", "12"),
        ("#### 5\nno, again\n#### $1,234.50\nand 7 more", "1234.5"),
        ("so \\boxed{\\frac{1}{2}} of 8", "\\frac{1}{2}"),
        ("so \\boxed{18}, not 81", "18"),
        ("It costs 5 dollars and then 1,000.0 more.", "1000"),
        ("1,2", "2"),
        ("that leaves -3", "-3"),
        ("that leaves −3", "-3"),
        ("0.50", "0.5"),
        ("-0", "0"),
        ("The answer is:\n  Blue   Whale. \n", "blue whale"),
        ("#### ", None),
        (" \n", None),
    ],
)
def test_what_a_text_comes_to(text, comes_to):
    assert final_answer(text) == comes_to


def test_right_is_the_same_final_answer():
    assert is_right("so 3 + 4 = 7", "work\n#### 7") and is_right("7.0", "7")
    assert not is_right("so 3 + 4 = 8", "#### 7") and not is_right("7 of 8", "7")
    # nothing said, nothing known
    assert not is_right("", "7") and not is_right("", "") and not is_right("7", "#### ")
