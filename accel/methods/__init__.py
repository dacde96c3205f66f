"""The table of methods: each plugs into one axis and lives in one folder. Loading a method imports only that folder."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from accel.errors import OptionError, unknown_name


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table. ``target`` and ``options`` are "module:Class"; options are a frozen dataclass.

    ``decodes``: "causal" for a decoder of models that read from left to right, "masked" for one of masked-diffusion
    models.
    """

    name: str
    axis: str
    target: str
    options: str | None
    help: str
    decodes: str = "causal"

    def load(self) -> Any:
        return _load(self.target)

    def load_options(self) -> type | None:
        return None if self.options is None else _load(self.options)


TABLE: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            "plain",
            "decoder",
            "accel.methods.plain.decoder:PlainDecoder",
            "accel.methods.plain.decoder:PlainOptions",
            "one token a step and row: what every lossless method must reproduce",
        ),
        MethodInfo(
            "speculative",
            "decoder",
            "accel.methods.speculative.decoder:SpeculativeDecoder",
            "accel.methods.speculative.options:SpeculativeOptions",
            "drafted tokens verified by the target, with a draft length that adapts to what they cost and bring",
        ),
        MethodInfo(
            "dparallel",
            "decoder",
            "accel.methods.dparallel.decoder:DParallelDecoder",
            "accel.methods.dparallel.options:DParallelOptions",
            "blocks of masks filled wherever a masked-diffusion model is certain: many tokens a forward",
            decodes="masked",
        ),
        MethodInfo(
            "cartridge",
            "target",
            "accel.methods.cartridge.cartridge:Cartridge",
            None,
            "a small trained key-value cache in front of the prompt that stands in for a long document",
        ),
        MethodInfo(
            "lawcat",
            "target",
            "accel.methods.lawcat.artifact:Lawcat",
            None,
            "softmax layers replaced by gated linear attention with a state of one size, however long the context",
        ),
        MethodInfo(
            "cascade",
            "router",
            "accel.methods.cascade.router:Cascade",
            "accel.methods.cascade.build:CascadeSetup",
            "a cheap student with a teacher's demonstrations, asked several times; the teacher where these differ",
        ),
    )
}


def get(name: str) -> MethodInfo:
    """The table's row for a method; an unknown name is refused with the known ones."""
    if name not in TABLE:
        raise OptionError(unknown_name("method", name, TABLE))
    return TABLE[name]


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
