"""``accel chat``: a conversation in the terminal, with a model loaded here or behind an OpenAI-compatible server.

Knows lines and figures. Where answers come from is behind ``Partner`` (accel/cli/partners.py).
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

import click

from accel.cli.common import DEFAULT_MODEL, Progress, artifact_option, options_option, use_threads
from accel.cli.partners import Figures, Local, Partner, Remote
from accel.errors import AccelError, OptionError

COMMANDS = {"/clear": "forget the conversation", "/help": "show this", "/exit": "end (Ctrl-D does too)"}


@click.command(short_help="Talk to a model in the terminal.")
@click.argument("model", required=False)
@artifact_option
@options_option
@click.option("--method", metavar="NAME", help="Decoding method, see `accel methods`. [default: the one for the model]")
@click.option("--url", metavar="URL", help="Ask an OpenAI-compatible server, as in http://127.0.0.1:8000/v1.")
@click.option("--api-key", metavar="KEY", help="Key for the server.")
@click.option("--system", metavar="TEXT", help="Instruction in front of the conversation.")
@click.option("--quick", metavar="QUESTION", help="Answer one question and end.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.")
@click.option(
    "--stats/--no-stats",
    "show_stats",
    default=None,
    help="Print tokens/s and acceptance on stderr after each answer. [default: on a terminal]",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's choice]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
def chat(
    model: str | None,
    url: str | None,
    api_key: str | None,
    system: str | None,
    quick: str | None,
    show_stats: bool | None,
    **settings: Any,
) -> None:
    """Talk to MODEL, which is loaded here, or with --url to a server's (by default the first that it lists).

    Each line is a message; /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. What is
    piped in is answered line by line.
    """
    with Progress() as progress:
        partner = _partner(model, url, api_key, settings, progress)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    talk = _Talk(partner, system, show_stats if show_stats is not None else on_terminal)
    try:
        if quick is not None:
            talk.ask(quick)
        else:
            _converse(talk, on_terminal)
    finally:
        partner.close()


def _partner(
    model: str | None, url: str | None, api_key: str | None, settings: dict[str, Any], progress: Progress
) -> Partner:
    limits = {name: settings.pop(name) for name in ("max_new_tokens", "temperature", "seed")}
    artifacts, options, threads = (settings.pop(name) for name in ("artifact", "options", "threads"))
    if url is None:
        if api_key is not None:
            raise OptionError("--api-key without --url: name the server that the key is for")
        use_threads(threads)
        progress("loading the model …")
        return Local(model or DEFAULT_MODEL, artifacts, settings | options, **limits)
    here = {"-a": artifacts, "-o": options, "--method": settings["method"], "--threads": threads}
    if loose := [name for name, value in here.items() if value]:
        raise OptionError(f"{', '.join(loose)} with --url: they are for a model that is loaded here")
    return Remote(url, model, api_key, **limits)


def _converse(talk: _Talk, on_terminal: bool) -> None:
    """Message by message until the input ends."""
    if on_terminal:
        # arrow keys and earlier lines; Windows has its own
        with suppress(ImportError):
            import readline  # noqa: F401
        click.echo(f"{talk.partner.name} · /help", err=True)
    while True:
        try:
            line = input("> ") if on_terminal else _next_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            # of a line that is being written, as in a shell
            click.echo(err=True)
            continue
        text = line.strip()
        if text == "/exit":
            return
        if text == "/clear":
            talk.clear()
        elif text == "/help":
            click.echo("\n".join(f"{name:<8}{what}" for name, what in COMMANDS.items()), err=True)
        elif text:
            # a person can ask again; a program must be told
            (talk.attempt if on_terminal else talk.ask)(text)


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


class _Talk:
    """A conversation so far, and how its answers are shown."""

    def __init__(self, partner: Partner, system: str | None, show_stats: bool) -> None:
        self.partner = partner
        self._head = [] if system is None else [{"role": "system", "content": system}]
        self._show_stats = show_stats
        self._messages = list(self._head)

    def clear(self) -> None:
        self._messages = list(self._head)

    def attempt(self, text: str) -> None:
        """The same as ``ask``; a question that fails is forgotten, and the next one may be better."""
        before = len(self._messages)
        try:
            self.ask(text)
        except AccelError as error:
            del self._messages[before:]
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        except KeyboardInterrupt:
            # before its first word: there is nothing to go on from
            del self._messages[before:]
            click.echo("stopped", err=True)

    def ask(self, text: str) -> None:
        """Show the answer as it comes, then its figures. Ctrl-C keeps what has been said."""
        self._messages.append({"role": "user", "content": text})
        begun, first = time.monotonic(), None
        said: list[str] = []
        stopped = False
        pieces = self.partner.stream(self._messages)
        try:
            for piece in pieces:
                first = first if first is not None else time.monotonic() - begun
                said.append(piece)
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            if not said:
                raise
            stopped = True
        finally:
            # whoever decodes or sends stops now, and not when the next answer is asked for
            pieces.close()
            if said:
                click.echo()
        self._messages.append({"role": "assistant", "content": "".join(said)})
        if self._show_stats:
            figures = None if stopped else self.partner.figures()
            click.echo(_line(figures, time.monotonic() - begun, first, stopped), err=True)


def _line(figures: Figures | None, seconds: float, first: float | None, stopped: bool) -> str:
    """``42 tokens in 1.30 s · 32.3 tokens/s · first after 0.12 s · τ 2.31 · 61 of 88 drafted tokens accepted``."""
    if figures is None or figures.tokens is None:
        parts = [f"stopped after {seconds:.2f} s" if stopped else f"{seconds:.2f} s"]
    else:
        parts = [f"{figures.tokens} tokens in {seconds:.2f} s", f"{figures.tokens / max(seconds, 1e-9):.1f} tokens/s"]
    if first is not None:
        parts.append(f"first after {first:.2f} s")
    if figures is not None and figures.accepted_length is not None:
        parts.append(f"τ {figures.accepted_length:.2f}")
    if figures is not None and figures.drafted:
        parts.append(f"{figures.accepted} of {figures.drafted} drafted tokens accepted")
    return " · ".join([*parts, *(figures.notes if figures is not None else ())])
