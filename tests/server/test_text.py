"""Pieces of text together are the text; stop strings end it wherever they are cut."""

from __future__ import annotations

from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from accel.server.choices import Vocabulary
from accel.server.text import Detokenizer, TextStream

TOKENIZER = byte_tokenizer()
DECODE = Vocabulary(TOKENIZER).decode
ANY_TEXT = st.text(st.sampled_from("ab ché→🎉\n"), max_size=30)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def pieces(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    found, begin = [], 0
    for size in [*sizes, len(tokens)]:
        found.append(tokens[begin : begin + size])
        begin += size
    return [each for each in found if each]


@given(tokens=st.lists(st.integers(0, 256), max_size=60), sizes=st.lists(st.integers(1, 4), max_size=40))
def test_pieces_are_the_text_of_all_tokens(tokens: list[int], sizes: list[int]) -> None:
    stream = Detokenizer(DECODE)
    parts = [stream.feed(piece) for piece in pieces(tokens, sizes)]
    assert "".join(parts) + stream.finish() == DECODE(tokens)


@given(text=ANY_TEXT)
def test_no_piece_has_half_a_character(text: str) -> None:
    stream = Detokenizer(DECODE)
    parts = [stream.feed([token]) for token in ids(text)]
    assert "".join(parts) == text and stream.finish() == ""


def test_bytes_that_never_are_text_are_handed_out_all_the_same() -> None:
    stream = Detokenizer(DECODE)
    tokens = ids("é")[:1] * 500
    parts = [stream.feed([token]) for token in tokens]
    # nothing that comes later can change what lies that far back
    assert len("".join(parts)) > 400
    assert "".join(parts) + stream.finish() == DECODE(tokens)


@given(
    text=ANY_TEXT, stops=st.lists(st.text(st.sampled_from("abc é→"), min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_text_ends_in_front_of_the_first_stop_string(text: str, stops: list[str]) -> None:
    for include in (False, True):
        stream = TextStream(DECODE, stops, include=include)
        told = ""
        for token in ids(text):
            told += stream.feed([token])
            # what was handed out is never taken back
            assert text.startswith(told)
            if stream.stopped:
                break
        told += stream.finish()
        places = [text.find(stop) for stop in stops if stop in text]
        if not places:
            assert told == text and stream.stopped is None
            continue
        assert stream.stopped in stops
        head = told.removesuffix(stream.stopped) if include else told
        assert not any(stop in head for stop in stops) and text.startswith(head + stream.stopped)


def test_a_piece_that_begins_a_stop_string_waits() -> None:
    stream = TextStream(DECODE, ["END"])
    assert stream.feed(ids("the E")) == "the "
    assert stream.feed(ids("N")) == ""
    assert stream.feed(ids("T")) == "ENT"
    assert stream.feed(ids(" EN")) == " "
    assert stream.feed(ids("D")) == "" and stream.stopped == "END"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    stream = TextStream(DECODE, ["b"], min_tokens=2)
    assert [stream.feed([token]) for token in ids("abab")] == ["a", "b", "a", ""]
    assert stream.stopped == "b"
