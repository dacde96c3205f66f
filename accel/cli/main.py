"""The ``accel`` command: a table of subcommands, loaded when called, and what becomes of errors.

Imports click and the errors alone, so that ``accel --help`` answers before torch could be loaded.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from accel.errors import AccelError

# name → (module:attribute, one line of help)
COMMANDS = {
    "generate": ("accel.cli.generate:generate", "Generate text with a model and its artifacts."),
    "chat": ("accel.cli.chat:chat", "Talk to a model in the terminal."),
    "serve": ("accel.cli.serve:serve", "Serve a model over HTTP, as OpenAI's API."),
    "bench": ("accel.cli.bench:bench", "Measure plain and accelerated decoding side by side."),
    "distill": ("accel.cli.distill:distill", "Make artifacts for a model from prompts."),
    "artifact": ("accel.cli.artifact:artifact", "List, inspect, verify and convert artifacts."),
    "methods": ("accel.cli.methods:methods", "Show the methods and their options."),
    "env": ("accel.cli.env:env", "Show versions, device, memory and folders."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when called; its own help reads the table alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        prepare(command, f"ACCEL_{cmd_name.upper()}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; a failure becomes one line and an exit code, or a traceback with ACCEL_DEBUG=1."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(130)
        except Exception as error:
            if os.environ.get("ACCEL_DEBUG") == "1":
                raise
            raise click.ClickException(one_line(error)) from error


def prepare(command: click.Command, prefix: str) -> None:
    """Give a command and its subcommands this group's ways: -h, and for each option a variable of its long name.

    click's own variables would follow Python's names (``as_json``).
    """
    # click keeps the help option of its first caller, which may not have been this group
    command._help_option = None
    for option in command.params:
        if isinstance(option, click.Option) and option.envvar is None:
            option.envvar = f"{prefix}_{max(option.opts, key=len).lstrip('-').replace('-', '_').upper()}"
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            prepare(child, f"{prefix}_{name.replace('-', '_').upper()}")


def one_line(error: Exception) -> str:
    """The user's mistakes and the system's refusals in their own words; anything else is our bug and says so."""
    text = " ".join(str(error).split())
    if isinstance(error, AccelError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (unexpected; set ACCEL_DEBUG=1 for the traceback)"


def _print_version(ctx: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"accel {accel_version()}")
        ctx.exit()


def accel_version() -> str:
    """The installed distribution's version."""
    try:
        return version("accel-runtime")
    except PackageNotFoundError:
        return "unknown (run from a folder that is not installed)"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Faster language-model inference with artifacts distilled for your model.

    Every option can be given by an environment variable: `accel generate --model` reads ACCEL_GENERATE_MODEL.
    ACCEL_DEBUG=1 shows tracebacks.
    """
