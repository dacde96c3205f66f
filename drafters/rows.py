"""The table of open rows that drafters keep. Knows nothing of what a row's state is."""

from __future__ import annotations

from typing import Generic, TypeVar

from accel.errors import OptionError

State = TypeVar("State")


class Rows(Generic[State]):
    """Row number → state. Opening a row twice and naming one that is not open are refused with a sentence."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._states: dict[int, State] = {}

    def open(self, row: int, state: State) -> None:
        if row in self._states:
            raise OptionError(f"row {row} is already open in the {self._owner} drafter: close it first")
        self._states[row] = state

    def __getitem__(self, row: int) -> State:
        try:
            return self._states[row]
        except KeyError:
            raise self._unknown(row) from None

    def close(self, row: int) -> None:
        if self._states.pop(row, None) is None:
            raise self._unknown(row)

    def states(self) -> list[State]:
        return list(self._states.values())

    def _unknown(self, row: int) -> OptionError:
        known = ", ".join(map(str, sorted(self._states))) or "none"
        return OptionError(
            f"row {row} is not open in the {self._owner} drafter (open rows: {known}): call open() first"
        )
