"""The cartridges of an attached model and of its draft: which of them each row of a call reads, and in which order.

Knows stores and names. What a row does with its segments is the target's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from accel.artifacts import Artifact, config_digest
from accel.drafters.base import Drafter
from accel.engine.given import opened, parted
from accel.errors import ArtifactError, IncompatibleError, OptionError
from accel.methods.cartridge.cartridge import Cartridge, check_fits, check_together
from accel.methods.cartridge.store import CartridgeStore
from accel.models.row_cache import Segment


@dataclass(frozen=True)
class Seat:
    """What stands in front of one row's prompt: in the target, and in the draft model."""

    cartridges: tuple[Cartridge, ...] = ()
    draft_cartridges: tuple[Cartridge, ...] = ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(each.segment for each in self.cartridges)

    @property
    def draft_segments(self) -> tuple[Segment, ...]:
        return tuple(each.segment for each in self.draft_cartridges)

    @property
    def num_positions(self) -> int:
        return sum(each.num_positions for each in self.segments)


class Cartridges:
    """``store`` holds the target's cartridges; ``draft_store`` the draft's, which join those of the same documents.

    ``defaults``: names that a call reads where it says nothing.
    """

    def __init__(self, model: PreTrainedModel, draft: Drafter | None, tokenizer: Any, max_bytes: int | None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self.store = CartridgeStore(self._load, max_bytes)
        self._draft_model: PreTrainedModel | None = getattr(draft, "model", None)
        self.draft_store = CartridgeStore(self._load_for_draft)
        self.defaults: list[str] = []

    def attach(self, given: Cartridge | Artifact) -> None:
        """Take a cartridge in: the target's is read by every call from now on, the draft's beside it."""
        if self._is_for_draft(given):
            self.draft_store.add(given)
        else:
            self.defaults.append(self.store.add(self._checked(given)))

    @contextmanager
    def use(self, asked: Any, num_rows: int) -> Iterator[list[Seat]]:
        """One seat for all rows, or ``num_rows`` of them, held in memory until the context ends.

        ``asked``: None for the defaults, a list of names, paths, artifacts or cartridges for every row, or one such
        list a row.
        """
        lists = self._lists(asked, num_rows)
        with ExitStack() as held:
            yield [self._seat(held.enter_context(self.store.use(names)), held) for names in lists]

    def template(self, asked: Any) -> str | None:
        """What the cartridges that a call asks for say about the prompt behind them; None where there are none."""
        with self.use(asked, 1) as (seat,):
            kinds = {each.parameters.template for each in seat.cartridges}
        if len(kinds) > 1:
            raise IncompatibleError(
                "some of the cartridges stand for a system message and some for plain text: no prompt fits both"
            )
        return next(iter(kinds), None)

    def _lists(self, asked: Any, num_rows: int) -> list[list[str]]:
        if asked is None:
            # removed since: what is gone is no longer read
            return [[name for name in self.defaults if name in self.store]]
        if isinstance(asked, str | Path | Artifact | Cartridge) or not isinstance(asked, Sequence):
            raise OptionError(f"cartridges={asked!r}: give a list of names or cartridges, or one such list a row")
        if not any(isinstance(each, list | tuple) for each in asked):
            return [[self._name(each) for each in asked]]
        if not all(isinstance(each, list | tuple) for each in asked):
            raise OptionError("cartridges: names and lists are mixed; give one list for all rows, or one list a row")
        if len(asked) != num_rows:
            raise OptionError(f"cartridges has {len(asked)} lists, the batch {num_rows} rows: give one list a row")
        return [[self._name(each) for each in names] for names in asked]

    def _name(self, given: Any) -> str:
        """The name of what a call asks for, which is taken in where it is not there yet."""
        if isinstance(given, str) and given in self.store:
            return given
        found, others = parted([opened(given)], Cartridge)
        if others:
            raise ArtifactError(f"{given!r} is no cartridge: give names, paths or accel.Cartridge objects")
        return self.store.add(self._checked(found[0]))

    def _checked(self, given: Cartridge | Artifact) -> Cartridge | Artifact:
        if isinstance(given, Cartridge):
            check_fits(given.parameters, self.model.config, given.name)
            found, wanted = given.segment.keys[0].dtype, self.model.dtype
            if found != wanted or given.segment.keys[0].device != self.model.device:
                raise IncompatibleError(
                    f"cartridge {given.name!r} is {found} on {given.segment.keys[0].device}, the model {wanted} on "
                    f"{self.model.device}: make or load it for this model"
                )
        return given

    def _is_for_draft(self, given: Cartridge | Artifact) -> bool:
        base = given.base if isinstance(given, Cartridge) else given.manifest.base
        if self._draft_model is None or base.config_digest == config_digest(self.model.config):
            return False
        return base.config_digest == config_digest(self._draft_model.config)

    def _load(self, artifact: Artifact) -> Cartridge:
        return Cartridge.load(artifact, self.model, self._tokenizer)

    def _load_for_draft(self, artifact: Artifact) -> Cartridge:
        assert self._draft_model is not None, "a draft's cartridge was recognised by its model"
        return Cartridge.load(artifact, self._draft_model)

    def _seat(self, cartridges: list[Cartridge], held: ExitStack) -> Seat:
        everything = held.enter_context(self.draft_store.use(self.draft_store.names()))
        pairs = {of: each for each in everything if (of := _documents(each))}
        mine = [pairs[of] for each in cartridges if (of := _documents(each)) in pairs]
        return Seat(tuple(cartridges), tuple(mine))


def _documents(cartridge: Cartridge) -> tuple[str, ...]:
    """What it stands in for, whatever the template and the tokenizer make of it."""
    return tuple(each.sha256 for each in cartridge.parameters.documents)


def notes(seats: Sequence[Seat]) -> list[str]:
    """What the caller should know of the seats' cartridges."""
    return list(dict.fromkeys(note for seat in seats for note in check_together(seat.cartridges)))
