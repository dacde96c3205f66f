"""`accel artifact convert`: files of other projects become artifacts. Knows which options belong to which format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accel.cli.common import emit, json_option, options_option
from accel.errors import OptionError, unknown_name

if TYPE_CHECKING:
    from accel.artifacts import Artifact

_CARTRIDGES = ("hazy", "attention-matching", "kvpress")
_CONVERSIONS = ("lawcat", "lolcats")


@click.command()
@click.argument(
    "sources", metavar="SOURCE…", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--model", metavar="NAME", required=True, help="The model that SOURCE was made for.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", required=True, help="Artifact to write.")
@click.option(
    "--format",
    "layout",
    default="auto",
    show_default=True,
    help="Cartridges: hazy (HazyResearch, two layouts), attention-matching, kvpress; auto goes by what the file holds. "
    "Linear attention: lawcat, lolcats.",
)
@click.option("--positions", type=int, help="Tokens of the original context, where SOURCE does not say it (kvpress).")
@click.option(
    "--template",
    help="Cartridges: what they stand for in a prompt: text (in front of anything) or system (the chat's system "
    "message). [default: text]",
)
@click.option("--lora-alpha", type=float, help="lawcat, lolcats: alpha of SOURCE's LoRA, which no tensor tells.")
@options_option
@click.option("--dtype", default="auto", show_default=True, help="Of MODEL and file: auto, float32, bfloat16, float16.")
@json_option
def convert(
    sources: tuple[Path, ...],
    model: str,
    output: Path,
    layout: str,
    positions: int | None,
    template: str | None,
    lora_alpha: float | None,
    options: dict[str, Any],
    dtype: str,
    as_json: bool,
) -> None:
    """Turn SOURCE of another project into an artifact: a cartridge or compressed cache, or linear attention.

    Linear attention may be several files, stage 1 before stage 2. What their tensors do not tell is given with -o:
    activation, gate_normalizer, min_log_decay, normalised, window, affine, eps.

    Pickle files are read by a restricted reader that builds tensors and plain containers alone.
    """
    known = ("auto", *_CARTRIDGES, *_CONVERSIONS)
    if layout not in known:
        raise OptionError(unknown_name("format", layout, known))
    if layout in _CONVERSIONS:
        _refuse(layout, {"--positions": positions, "--template": template})
        written, told = _linear(sources, model, output, layout, lora_alpha, options, dtype)
    else:
        _refuse("cartridge", {"--lora-alpha": lora_alpha, "-o": options or None})
        if len(sources) > 1:
            raise OptionError(f"{len(sources)} files: a cartridge is one; --format lawcat and lolcats take several")
        written, told = _cartridge(sources[0], model, output, layout, positions, template or "text", dtype)
    document = {"path": str(written.path), **dataclasses.asdict(written.manifest)}
    emit(document, f"{written.path}: {told}, for {model}", as_json=as_json)


def _refuse(what: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None:
            raise OptionError(f"{option} {value!r} is not for a {what}: leave it out, or name another --format")


def _cartridge(
    source: Path, model: str, output: Path, layout: str, positions: int | None, template: str, dtype: str
) -> tuple[Artifact, str]:
    from accel.methods.cartridge.convert import read
    from accel.methods.cartridge.convert.adopt import adopt
    from accel.methods.lawcat.published import recognises
    from accel.models.loading import load_model

    if layout == "auto" and recognises(source):
        raise OptionError(
            f"{source} holds linear attention, of two projects that compute different things with the same names: say "
            f"--format {' or '.join(_CONVERSIONS)}"
        )
    foreign = read(source, layout)
    loaded, tokenizer = load_model(model, device="cpu", dtype=dtype)
    cartridge = adopt(foreign, output.name, loaded, tokenizer, template=template, positions=positions)
    base = dataclasses.replace(cartridge.base, name=model)
    made = {"source": source.name, **foreign.details}
    written = dataclasses.replace(cartridge, base=base).save(output, made=made)
    return written, f"{cartridge.num_tokens} slots, {foreign.details.get('format')}"


def _linear(
    sources: tuple[Path, ...],
    model: str,
    output: Path,
    family: str,
    lora_alpha: float | None,
    choices: dict[str, Any],
    dtype: str,
) -> tuple[Artifact, str]:
    from accel.methods.lawcat.published import adopt, read
    from accel.models.loading import load_model

    stages = [read(source) for source in sources]
    loaded, tokenizer = load_model(model, device="cpu", dtype=dtype)
    found = adopt(output.name, stages, loaded, tokenizer, family=family, lora_alpha=lora_alpha, **choices)
    base = dataclasses.replace(found.base, name=model)
    made = {"source": ", ".join(source.name for source in sources), "format": family}
    written = dataclasses.replace(found, base=base).save(output, made=made)
    return written, f"{len(found.spec.layers)} linear layers, {family}"
