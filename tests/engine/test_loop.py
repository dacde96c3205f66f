"""The loop with a decoder that follows a script: who is admitted, clipped, handed out and evicted, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from accel.axes import Router
from accel.engine.loop import Engine
from accel.engine.stopping import CriteriaStopper, TogetherStopper
from accel.types import Chunk, Emission, Request, Stats

# a script: for each request, the tokens of each of its steps
Script = dict[int, list[list[int]]]


class ScriptedDecoder:
    """Emits what its script says; afterwards, one 99 a step."""

    def __init__(self, script: Script, *, fail_at: int | None = None, fail_on_admit: bool = False) -> None:
        self.stats = Stats(accepted_tokens=100)
        self.script = {id: list(steps) for id, steps in script.items()}
        self.fail_at, self.fail_on_admit = fail_at, fail_on_admit
        self.live: list[int] = []
        self.log: list[tuple[str, list[int]]] = []
        self.steps = 0

    def admit(self, requests: Sequence[Request]) -> None:
        ids = [r.id for r in requests]
        self.log.append(("admit", ids))
        self.live += ids
        if self.fail_on_admit:
            raise MemoryError("no room")

    def step(self) -> list[Emission]:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the device is gone")
        emissions = []
        for id in self.live:
            tokens = self.script[id].pop(0) if self.script[id] else [99]
            if tokens:
                marks = torch.tensor(tokens).float()[:, None]
                emissions.append(Emission(id, tokens, logits=marks, scores=-marks))
        return emissions

    def evict(self, request_ids: Sequence[int]) -> None:
        if request_ids:
            self.log.append(("evict", list(request_ids)))
        self.live = [id for id in self.live if id not in request_ids]

    def evicted(self) -> list[int]:
        return [id for what, ids in self.log for id in ids if what == "evict"]


class StopAt:
    """Ends a row at a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def clip(self, emission: Emission) -> tuple[int, bool]:
        if self.token in emission.tokens:
            return emission.tokens.index(self.token) + 1, True
        return len(emission.tokens), False


def requests(count: int) -> list[Request]:
    prompt = torch.tensor([1])
    return [Request(id=i, prompt=prompt, max_new_tokens=50, history=prompt) for i in range(count)]


def tokens_of(chunks: Sequence[Chunk]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for chunk in chunks:
        out.setdefault(chunk.request_id, []).extend(chunk.tokens)
    return out


def test_chunks_come_as_tokens_become_final() -> None:
    decoder = ScriptedDecoder({0: [[1], [2, 3], [0]], 1: [[4, 0]]})
    chunks = list(Engine(decoder, StopAt(0)).answer(requests(2)))
    assert [(c.request_id, c.tokens, c.finished) for c in chunks] == [
        (0, [1], False),
        (1, [4, 0], True),
        (0, [2, 3], False),
        (0, [0], True),
    ]
    assert decoder.log == [("admit", [0, 1]), ("evict", [1]), ("evict", [0])]


def test_no_more_rows_than_allowed_and_the_next_comes_when_one_goes() -> None:
    script = {0: [[1], [1], [0]], 1: [[0]], 2: [[2], [0]], 3: [[0]], 4: [[5, 0]]}
    decoder = ScriptedDecoder(script)
    engine = Engine(decoder, StopAt(0), max_rows=2)
    most, chunks = 0, []
    for chunk in engine.answer(requests(5)):
        most = max(most, len(decoder.live))
        chunks.append(chunk)
    assert most == 2
    assert tokens_of(chunks) == {0: [1, 1, 0], 1: [0], 2: [2, 0], 3: [0], 4: [5, 0]}
    # in order, each once, as soon as there is room
    assert [ids for what, ids in decoder.log if what == "admit"] == [[0, 1], [2], [3, 4]]
    assert sorted(decoder.evicted()) == [0, 1, 2, 3, 4]


def test_without_a_limit_all_are_admitted_at_once() -> None:
    decoder = ScriptedDecoder({i: [[0]] for i in range(9)})
    assert len(list(Engine(decoder, StopAt(0)).answer(requests(9)))) == 9
    assert decoder.log[0] == ("admit", list(range(9)))


def test_an_emission_is_clipped_in_its_middle_with_its_scores() -> None:
    decoder = ScriptedDecoder({0: [[7, 0, 8, 9]]})
    (chunk,) = Engine(decoder, StopAt(0)).answer(requests(1))
    assert (chunk.tokens, chunk.finished, chunk.late) == ([7, 0], True, False)
    assert chunk.logits is not None and chunk.logits.flatten().tolist() == [7, 0]
    assert chunk.scores is not None and chunk.scores.flatten().tolist() == [-7, 0]
    # the two behind the end were accepted by the decoder, and count for nobody
    assert decoder.stats.accepted_tokens == 98


def test_nothing_is_discarded_where_a_row_goes_on_or_ends_at_its_last_token() -> None:
    decoder = ScriptedDecoder({0: [[7, 8], [9, 0]]})
    list(Engine(decoder, StopAt(0)).answer(requests(1)))
    assert decoder.stats.accepted_tokens == 100


def test_a_step_without_tokens_is_fine() -> None:
    decoder = ScriptedDecoder({0: [[], [], [3, 0]], 1: [[0]]})
    assert tokens_of(list(Engine(decoder, StopAt(0)).answer(requests(2)))) == {0: [3, 0], 1: [0]}


def test_rows_in_step_stay_until_all_are_done() -> None:
    decoder = ScriptedDecoder({0: [[1], [0]], 1: [[0]], 2: [[1], [2], [0]]})
    chunks = list(Engine(decoder, StopAt(0), in_step=True).answer(requests(3)))
    assert tokens_of([c for c in chunks if not c.late]) == {0: [1, 0], 1: [0], 2: [1, 2, 0]}
    assert [(c.request_id, c.tokens, c.finished) for c in chunks if c.late] == [
        (1, [99], True),
        (0, [99], True),
        (1, [99], True),
    ]
    assert decoder.log == [("admit", [0, 1, 2]), ("evict", [0, 1, 2])]


def test_rows_in_step_with_criteria_that_look_at_the_batch() -> None:
    seen: list[list[list[int]]] = []

    def all_rows(ids, scores):
        seen.append(ids.tolist())
        return ids[:, -1] == 0

    stopper = TogetherStopper([all_rows], torch.tensor([[1], [1]]), max_new_tokens=3)
    decoder = ScriptedDecoder({0: [[0], [5], [6]], 1: [[7], [8], [9]]})
    chunks = list(Engine(decoder, stopper, in_step=True).answer(requests(2)))
    assert seen == [[[1, 0], [1, 7]], [[1, 0, 5], [1, 7, 8]], [[1, 0, 5, 6], [1, 7, 8, 9]]]
    assert [(c.request_id, c.finished, c.late) for c in chunks] == [
        (0, True, False),
        (1, False, False),
        (0, True, True),
        (1, False, False),
        (0, True, True),
        (1, True, False),
    ]


def test_rows_are_freed_when_the_reader_stops() -> None:
    decoder = ScriptedDecoder({0: [[1]], 1: [[0]], 2: [[1]], 3: [[1]]})
    chunks = Engine(decoder, StopAt(0), max_rows=3).answer(requests(4))
    for _ in range(4):
        next(chunks)
    chunks.close()
    assert decoder.live == []
    assert sorted(decoder.evicted()) == sorted({id for what, ids in decoder.log if what == "admit" for id in ids})


@pytest.mark.parametrize("broken", [{"fail_at": 2}, {"fail_on_admit": True}], ids=["in a step", "in the prefill"])
def test_rows_are_freed_when_the_decoder_fails(broken: dict) -> None:
    decoder = ScriptedDecoder({0: [[1], [1]], 1: [[1], [1]], 2: []}, **broken)
    engine = Engine(decoder, StopAt(0), max_rows=2)
    with pytest.raises((RuntimeError, MemoryError)):
        list(engine.answer(requests(3)))
    assert decoder.live == []
    assert decoder.evicted() == [0, 1]


def test_an_engine_runs_again_after_it_was_left() -> None:
    decoder = ScriptedDecoder({0: [[1], [1]], 1: [[1], [1]]})
    engine = Engine(decoder, StopAt(0), max_rows=1)
    next(first := engine.answer(requests(2)))
    first.close()
    decoder.script = {0: [[4, 0]]}
    assert tokens_of(list(engine.answer(requests(1)))) == {0: [4, 0]}


def test_no_requests_no_chunks() -> None:
    decoder = ScriptedDecoder({})
    assert list(Engine(decoder, StopAt(0)).answer([])) == []
    assert decoder.steps == 0


def test_length_ends_a_row_in_the_middle_of_an_emission() -> None:
    decoder = ScriptedDecoder({0: [[1, 2], [3, 4, 5]]})
    stopper = CriteriaStopper([], torch.tensor([[1]]), max_new_tokens=3)
    assert tokens_of(list(Engine(decoder, stopper).answer(requests(1)))) == {0: [1, 2, 3]}
    assert decoder.stats.accepted_tokens == 98


def test_the_engine_is_the_direct_router() -> None:
    assert isinstance(Engine(ScriptedDecoder({}), StopAt(0)), Router)
