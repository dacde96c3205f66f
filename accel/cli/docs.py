"""``python -m accel.cli.docs FILE``: the command line's reference page, made from ``--help`` itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from accel.cli.main import main

WIDTH = 100
HEAD = """\
# Command line

Made from `--help` by `make docs`; a test fails while this page differs.
"""


def pages(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    """A command and, depth first, its subcommands: the full name and the help page of each."""
    # each command starts from its own settings; the width is fixed so that the terminal plays no part
    context = click.Context(
        command, parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH, **command.context_settings
    )
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from pages(found, context, child)


def render() -> str:
    """docs/cli.md as it should be."""
    sections = [f"## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in pages(main, None, "accel")]
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(), encoding="utf-8")
