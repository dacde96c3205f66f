"""The demonstrations to show at a step: found by goal, plan and what is seen or thought, cut to a window.

Joins the database and the search. Any number of stores, in threads and processes, may use one file: what one adds the
others find at their next retrieval.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from accel.errors import AccelError, ArtifactError, OptionError
from accel.methods.cascade.embedding import Embedder
from accel.methods.cascade.store.database import VECTOR, Database, Rows, VectorGone, texts_of
from accel.methods.cascade.store.demonstration import FIELDS, STEP_FIELDS, TASK_FIELDS, Demonstration, Step
from accel.methods.cascade.store.search import Column, Fields, Table

# texts of queries whose vectors are kept: a goal and a plan stand at every step of an episode
REMEMBERED = 1024
# demonstrations embedded and written together by an import
IMPORTED_AT_ONCE = 256


@dataclass(frozen=True)
class Situation:
    """Where somebody stands: what retrieval compares. Empty texts are left out of the comparison.

    With ``reasoning`` the step is found by what is thought, and the observation is left out: the second retrieval of a
    step, when the reason is known and the action is not. ``episode``: the task at hand, whose own demonstrations are
    not shown.
    """

    goal: str = ""
    plan: str = ""
    observation: str = ""
    reasoning: str = ""
    episode: str | None = None

    def queries(self) -> dict[str, str]:
        """Texts by field."""
        step = "reasoning" if self.reasoning else "observation"
        return {name: text for name in (*TASK_FIELDS, step) if (text := getattr(self, name))}

    def thinking(self, reasoning: str) -> Situation:
        """The same place, a thought later."""
        return replace(self, reasoning=reasoning)


@dataclass(frozen=True)
class Found:
    """A demonstration, the step that matched, and the window [start, stop) around it. ``score``: −1..1."""

    demonstration: Demonstration
    step: int
    start: int
    stop: int
    score: float

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.demonstration.steps[self.start : self.stop]


@dataclass(frozen=True)
class Added:
    """What became of demonstrations that were handed over."""

    added: int
    duplicates: int


@dataclass
class _Loaded:
    """What this store has read of the file; grows at its end."""

    # the last demonstration read, and the removals counted then
    behind: int = 0
    removals: int = -1
    columns: dict[str, Column] = field(default_factory=dict)
    # vector id → its row in the column
    places: dict[str, dict[int, int]] = field(default_factory=lambda: {name: {} for name in FIELDS})
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    outcomes: Tensor = field(default_factory=lambda: torch.empty(0))
    episodes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    sources: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    # windows: which demonstration (by index), which of its steps, which rows of the columns
    owner: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    position: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    rows: dict[str, Tensor] = field(default_factory=lambda: {n: torch.empty(0, dtype=torch.long) for n in FIELDS})


class DemonstrationStore:
    """Demonstrations in one file.

    ``device``: "cpu" scans in memory; on a GPU the windows lie there, and the ``similarity`` kernel searches them.
    """

    def __init__(
        self, path: str | Path, embedder: Embedder, *, device: str | torch.device = "cpu", create: bool = True
    ) -> None:
        self.embedder = embedder
        self.device = torch.device(device)
        self._database = Database(path, embedder.name, embedder.digest, embedder.size, create=create)
        self._lock = threading.Lock()
        self._loaded = self._nothing()
        self._names: dict[str, int] = {}
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()
        self._table: Table | None = None

    def __len__(self) -> int:
        return self._database.count()

    def __enter__(self) -> DemonstrationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self._database.path

    def close(self) -> None:
        self._database.close()

    def add(self, demonstrations: Iterable[Demonstration]) -> Added:
        """Keep all that are new, or none if that fails; the same trajectory with the same outcome is kept once."""
        given = list(demonstrations)
        texts = list(dict.fromkeys(text for each in given for text in texts_of(each)))
        try:
            # if somebody adds the same text meanwhile, the file keeps the first of two equal vectors
            number = self._database.add(given, self._vectors(self._database.unknown(texts)))
        except VectorGone:
            number = self._database.add(given, self._vectors(texts))
        return Added(number, len(given) - number)

    def remove(self, *, episode: str) -> int:
        """Take out what an episode demonstrated; returns how many demonstrations that were."""
        return self._database.remove(self._database.ids(episode))

    def import_jsonl(self, path: str | Path) -> Added:
        """Add a file with one demonstration a line. A wrong line is refused by its number, before anything is added."""
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise OptionError(f"{path} cannot be read: {error.strerror or error}") from error
        found = [
            Demonstration.from_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
        ]
        batches = [self.add(found[at : at + IMPORTED_AT_ONCE]) for at in range(0, len(found), IMPORTED_AT_ONCE)]
        return Added(sum(each.added for each in batches), sum(each.duplicates for each in batches))

    def export_jsonl(self, path: str | Path) -> int:
        """Write all demonstrations, one a line, oldest first; the file appears whole. Returns how many they are."""
        target = Path(path)
        work = target.with_name(f".{target.name}.{os.getpid()}")
        number = 0
        try:
            with open(work, "w", encoding="utf-8") as file:
                for body in self._database.bodies():
                    file.write(body + "\n")
                    number += 1
            os.replace(work, target)
        except OSError as error:
            raise AccelError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            work.unlink(missing_ok=True)
        return number

    def retrieve(
        self,
        situation: Situation,
        k: int,
        *,
        window: int = 5,
        min_outcome: float | None = 1.0,
        exclude_episodes: Collection[str] = (),
        sources: Collection[str] | None = None,
    ) -> list[Found]:
        """The k most similar demonstrations, the best first, each with ``window`` steps around the one that matched.

        Only those with an outcome of ``min_outcome`` or more (None: any), of one of ``sources`` (None: anybody's), not
        of the situation's own episode or ``exclude_episodes``. No demonstration and no shown text comes twice.
        """
        if type(k) is not int or k < 1:
            raise OptionError(f"k={k!r}: demonstrations to retrieve, a whole number ≥ 1")
        if type(window) is not int or window < 1:
            raise OptionError(f"window={window!r}: steps to show of a demonstration, a whole number ≥ 1")
        for name, names in (("exclude_episodes", exclude_episodes), ("sources", sources)):
            if isinstance(names, str):
                raise OptionError(f"{name}={names[:40]!r}: a list of names, not one text")
        texts = situation.queries()
        if not texts:
            raise OptionError("an empty situation: give a goal, a plan, an observation or a reasoning to compare")
        queries = dict(zip(texts, self._query_vectors(list(texts.values())), strict=True))
        excluded = {*exclude_episodes} | ({situation.episode} if situation.episode is not None else set())
        with self._lock:
            self._refresh()
            loaded = self._loaded
            allowed = self._allowed(loaded, min_outcome, excluded, sources)[loaded.owner]
            fields = Fields({name: column.view() for name, column in loaded.columns.items()}, loaded.rows)
            searched = fields if self.device.type == "cpu" else self._on_device(fields)
            # what grows is replaced and not written to: the search needs the lock no longer
            owner, position, ids = loaded.owner, loaded.position, loaded.ids
        found = self._distinct(searched.ranked(queries, allowed), owner, position, ids, window)
        return list(islice(found, k))

    def _distinct(
        self, ranked: Iterable[tuple[int, float]], owner: Tensor, position: Tensor, ids: Tensor, window: int
    ) -> Iterable[Found]:
        seen: set[int] = set()
        shown: set[tuple[object, ...]] = set()
        for index, score in ranked:
            demonstration, step = int(owner[index]), int(position[index])
            if demonstration in seen:
                continue
            seen.add(demonstration)
            body = self._database.body(int(ids[demonstration]))
            if body is None:  # taken out since this store looked
                continue
            whole = Demonstration.from_json(body)
            # centred, and moved inwards at the ends
            start = max(0, min(step - (window - 1) // 2, len(whole.steps) - window))
            found = Found(whole, step, start, min(start + window, len(whole.steps)), score)
            text = (whole.goal, whole.plan, *((s.observation, s.reasoning, s.action) for s in found.steps))
            if text not in shown:
                shown.add(text)
                yield found

    def _allowed(
        self, loaded: _Loaded, min_outcome: float | None, excluded: set[str], sources: Collection[str] | None
    ) -> Tensor:
        """bool [demonstrations]."""
        allowed = torch.ones(len(loaded.ids), dtype=torch.bool)
        if min_outcome is not None:
            allowed &= loaded.outcomes >= min_outcome
        for name in excluded:
            allowed &= loaded.episodes != self._names.get(name, -2)
        if sources is not None:
            known = torch.tensor([self._names.get(name, -2) for name in sources], dtype=torch.long)
            allowed &= torch.isin(loaded.sources, known)
        return allowed

    def _refresh(self) -> None:
        rows = self._database.rows(self._loaded.behind)
        if rows.removals != self._loaded.removals:
            # also the first time
            self._loaded, self._table = self._nothing(), None
            rows = self._database.rows(0)
            self._loaded.removals = rows.removals
        if rows.demonstrations:
            self._table = None
            try:
                self._grow(self._loaded, rows)
            except BaseException:
                # half of it is worse than beginning again
                self._loaded = self._nothing()
                raise

    def _grow(self, loaded: _Loaded, rows: Rows) -> None:
        first = len(loaded.ids)
        index = {each[0]: first + number for number, each in enumerate(rows.demonstrations)}
        tasks = {each[0]: each[4:] for each in rows.demonstrations}
        loaded.ids = _longer(loaded.ids, [each[0] for each in rows.demonstrations])
        loaded.outcomes = _longer(loaded.outcomes, [each[1] for each in rows.demonstrations])
        loaded.episodes = _longer(loaded.episodes, [self._number(each[2]) for each in rows.demonstrations])
        loaded.sources = _longer(loaded.sources, [self._number(each[3]) for each in rows.demonstrations])
        loaded.owner = _longer(loaded.owner, [index[each[0]] for each in rows.steps])
        loaded.position = _longer(loaded.position, [each[1] for each in rows.steps])
        for number, name in enumerate(TASK_FIELDS):
            self._place(loaded, name, [tasks[each[0]][number] for each in rows.steps])
        for number, name in enumerate(STEP_FIELDS):
            self._place(loaded, name, [each[2 + number] for each in rows.steps])
        loaded.behind = rows.demonstrations[-1][0]

    def _place(self, loaded: _Loaded, name: str, vectors: Sequence[int | None]) -> None:
        """Give each new window its row of a column; −1 where it has no such text."""
        places, column = loaded.places[name], loaded.columns[name]
        new = [each for each in dict.fromkeys(vectors) if each is not None and each not in places]
        if new:
            places.update({each: len(column) + number for number, each in enumerate(new)})
            column.append(torch.from_numpy(self._database.vectors(new, self.embedder.size)))
        rows = [-1 if each is None else places[each] for each in vectors]
        loaded.rows = loaded.rows | {name: _longer(loaded.rows[name], rows)}

    def _on_device(self, fields: Fields) -> Table:
        if self._table is None:
            self._table = Table(fields, FIELDS, self.device)
        return self._table

    def _query_vectors(self, texts: list[str]) -> list[Tensor]:
        with self._lock:
            known = {text: self._remembered[text] for text in texts if text in self._remembered}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known |= dict(zip(new, self._embed(new), strict=True))
        with self._lock:
            for text in texts:
                self._remembered[text] = known[text]
                self._remembered.move_to_end(text)
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return [known[text] for text in texts]

    def _vectors(self, texts: list[str]) -> dict[str, bytes]:
        """What the file keeps of texts."""
        rows = self._embed(texts).half().numpy().astype(VECTOR) if texts else ()
        return {text: row.tobytes() for text, row in zip(texts, rows, strict=True)}

    def _embed(self, texts: list[str]) -> Tensor:
        """Unit vectors, fp32 [n, D] on the CPU."""
        vectors = self.embedder.embed(texts).float().cpu()
        if vectors.shape != (len(texts), self.embedder.size) or not bool(torch.isfinite(vectors).all()):
            raise ArtifactError(
                f"the embedder {self.embedder.name} gave {list(vectors.shape)}, or NaN: it must give finite vectors "
                f"[{len(texts)}, {self.embedder.size}]"
            )
        return torch.nn.functional.normalize(vectors, dim=-1)

    def _number(self, name: str | None) -> int:
        """A number for an episode or a source; −1 for none."""
        return -1 if name is None else self._names.setdefault(name, len(self._names))

    def _nothing(self) -> _Loaded:
        return _Loaded(columns={name: Column(self.embedder.size) for name in FIELDS})


def _longer(tensor: Tensor, more: Sequence[float]) -> Tensor:
    return torch.cat([tensor, torch.tensor(more, dtype=tensor.dtype)])
