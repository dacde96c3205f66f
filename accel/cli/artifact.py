"""`accel artifact`: list, inspect, verify and convert artifacts. Knows of methods only what verifying needs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from accel.artifacts import Check, list_artifacts, open_artifact, read_manifest, resolve
from accel.artifacts import verify as verify_artifact
from accel.cli.convert import convert
from accel.errors import AccelError, OptionError

# what the path of a cartridge is proved with: tokens of context, and rows of so many tokens behind it
_PARITY_TOKENS = 512
_PARITY_QUERIES = (1, 7, 24)

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout instead of text.")


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except AccelError as error:
        raise click.ClickException(str(error)) from error


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, sort_keys=True))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes} bytes"


@click.group()
def artifact() -> None:
    """List, inspect, verify and convert distilled artifacts."""


artifact.add_command(convert)


@artifact.command("list")
@_AS_JSON
def list_command(as_json: bool) -> None:
    """Show the artifacts that can be named by their id."""
    rows: list[dict[str, Any]] = []
    for found in list_artifacts():
        row: dict[str, Any] = {"id": found.id, "path": str(found.path)}
        try:
            manifest = read_manifest(found.path)
        except AccelError as error:
            row["error"] = str(error)
        else:
            num_bytes = sum(entry.bytes for entry in manifest.files.values())
            row |= {"kind": manifest.kind, "base": manifest.base.name, "bytes": num_bytes}
        rows.append(row)
    if as_json:
        _print_json(rows)
    elif not rows:
        click.echo("no artifacts: set ACCEL_ARTIFACTS to a folder that holds some", err=True)
    for row in [] if as_json else rows:
        if "error" in row:
            click.echo(f"{row['id']}  broken: {row['error']}")
        else:
            click.echo(f"{row['id']}  {row['kind']} for {row['base']}  {_size(row['bytes'])}  {row['path']}")


@artifact.command()
@click.argument("path")
@_AS_JSON
def inspect(path: str, as_json: bool) -> None:
    """Show the manifest of the artifact PATH, a folder or an id."""
    with _one_line():
        folder = resolve(path)
        manifest = read_manifest(folder)
    if as_json:
        _print_json({"path": str(folder), **dataclasses.asdict(manifest)})
        return
    base = manifest.base
    click.echo(f"{manifest.kind} artifact, format {manifest.format_version}, in {folder}")
    click.echo(f"for        {base.name}" + (f" at {base.revision}" if base.revision else ""))
    click.echo(f"           vocabulary {base.vocab_size}, config {base.config_digest}")
    click.echo(f"           tokenizer {base.tokenizer_digest or 'not recorded'}")
    for title, values in (
        ("parameters", manifest.parameters),
        ("made", manifest.made),
        ("measured", manifest.measured),
    ):
        for key, value in sorted(values.items()):
            click.echo(f"{title:10} {key}: {json.dumps(value, sort_keys=True)}")
    for name, entry in sorted(manifest.files.items()):
        click.echo(f"file       {name}  {_size(entry.bytes)}  sha256 {entry.sha256}")


@artifact.command()
@click.argument("path")
@click.option(
    "--model", metavar="NAME", help="cartridge: the model to prove it with. [default: the one it was made for]"
)
@click.option("--files-only", is_flag=True, help="cartridge: load no model, look at the files alone.")
@_AS_JSON
@click.pass_context
def verify(context: click.Context, path: str, model: str | None, files_only: bool, as_json: bool) -> None:
    """Check every file of the artifact PATH, a folder or an id: digests, sizes, links, NaN and infinity.

    A cartridge is also held against its model, and the model is made to read a whole text through the cartridge path:
    the logits must be those of the text in the prompt.
    """
    with _one_line():
        folder = resolve(path)
        checks = verify_artifact(folder)
        is_cartridge = all(check.ok for check in checks) and read_manifest(folder).kind == "cartridge"
        if not is_cartridge and (model is not None or files_only):
            raise OptionError(f"{path} is no sound cartridge: --model and --files-only are for cartridges")
        if is_cartridge and not files_only:
            checks += _cartridge_checks(folder, model)
    failed = [check for check in checks if not check.ok]
    if as_json:
        rows = [dataclasses.asdict(check) for check in checks]
        _print_json({"path": str(folder), "ok": not failed, "checks": rows})
    else:
        for check in failed:
            click.echo(f"{check.name}: {check.detail}", err=True)
        if not failed:
            click.echo(f"{folder}: all {len(checks)} checks passed")
    if failed:
        context.exit(1)


def _cartridge_checks(folder: Path, name: str | None) -> list[Check]:
    """Load the cartridge's model, read the cartridge for it, and prove the path that it is read on."""
    from accel.methods.cartridge import parity
    from accel.methods.cartridge.cartridge import Cartridge
    from accel.models.loading import load_model

    opened = open_artifact(folder)
    model, tokenizer = load_model(name or opened.manifest.base.name, device="auto", dtype="auto")
    try:
        cartridge = Cartridge.load(opened, model, tokenizer)
    except AccelError as error:
        return [Check("model", False, str(error))]
    # any text does: what is proved is the path
    length = min(cartridge.num_tokens, _PARITY_TOKENS)
    ids = [(7 * place + 11) % opened.manifest.base.vocab_size for place in range(length + max(_PARITY_QUERIES))]
    found = parity.ratio(model, ids[:length], [ids[length : length + size] for size in _PARITY_QUERIES])
    allowed = parity.tolerance(model)
    detail = f"RMS ratio {found:.1e} of {length} tokens through the cartridge path, at most {allowed:.0e} allowed"
    return [Check("model", True, f"fits {opened.manifest.base.name}"), Check("parity", found <= allowed, detail)]
