"""``accel bench serve``: options to a plan of load on servers. Knows nothing of how a server is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from accel.cli.common import Progress, command_line
from accel.errors import OptionError


@click.command("serve")
@click.option(
    "--url",
    "urls",
    multiple=True,
    required=True,
    metavar="[NAME=]URL",
    help="A server, as http://HOST:PORT; repeat it, with names, to compare several on the same prompts.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]ID",
    help="The model to ask for, of all servers or of NAME. [default: the first at /v1/models]",
)
@click.option("--endpoint", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON lines as for `accel bench`; the first turn is asked. [default: 18 embedded prompts]",
)
@click.option("--num-prompts", type=int, help="Requests a round; prompts come again where these are more. [all once]")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Tokens that an answer may have.")
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens whatever the model says.")
@click.option("--temperature", type=float, help="0 is greedy. [default: the server's own]")
@click.option("--extra-body", metavar="JSON", help="More fields of every request, as an object.")
@click.option(
    "--request-rate", type=float, default=float("inf"), show_default=True, help="Requests a second; inf: all at once."
)
@click.option(
    "--burstiness",
    type=float,
    default=1.0,
    show_default=True,
    help="Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier, inf is an even beat.",
)
@click.option("--max-concurrency", type=int, help="Requests under way at once. [default: no limit]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the arrivals.")
@click.option(
    "--repeat",
    type=int,
    default=1,
    show_default=True,
    help="Rounds; in each, every server is asked the same prompts, another one first.",
)
@click.option("--warmup", type=int, default=0, show_default=True, help="Requests to each server before the clock.")
@click.option("--ready-timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for a server.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds after which a request failed.")
@click.option(
    "--goodput",
    multiple=True,
    metavar="NAME:MS,…",
    help="Limits that a good request keeps: ttft, tpot, e2el, as in ttft:500,e2el:3000.",
)
@click.option("--api-key", metavar="KEY", help="Sent to every server; better given by its variable.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Goes into the document; repeatable.")
@click.option("--save-detailed", is_flag=True, help="Keep every request's times, tokens and text in the document.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Save the JSON document here, again after every round.",
)
@click.option("--append-result", is_flag=True, help="Add the document to --output as one more line.")
@click.pass_context
def serve(context: click.Context, **given: Any) -> None:
    """Put load on servers, any that speak OpenAI's protocol.

    Definitions and JSON keys are vLLM's: TTFT to the first chunk, TPOT = (latency − TTFT) / (tokens − 1), ITL every gap
    between chunks. Tokens are the servers' own counts. Counters of speculation at /metrics, before and after, give the
    acceptance. Failed requests are counted, with what they said; the exit code is 1 where none was answered.

    With several servers or rounds the document holds every round, and the ratio of the first server's output tokens a
    second to each other one's, within each round.
    """
    targets = _targets(given["urls"], given["models"])
    extra = _extra(given["extra_body"])
    metadata = _metadata(given["metadata"])
    from accel.bench import saving
    from accel.bench.serving import figures, report, session
    from accel.bench.serving.client import Ask

    plain = ("num_prompts", "request_rate", "burstiness", "max_concurrency", "seed", "repeat", "warmup")
    plan = session.Plan(
        [session.Target(*each) for each in targets],
        Ask(given["endpoint"], given["max_tokens"], given["temperature"], given["ignore_eos"], extra, given["timeout"]),
        given["prompt_file"],
        **{name: given[name] for name in (*plain, "ready_timeout", "save_detailed", "output")},
        goodput=figures.parse_goodput(given["goodput"]),
        metadata=metadata,
        key=given["api_key"],
        append=given["append_result"],
        command=command_line(secret=given["api_key"]),
    )
    with Progress() as progress:
        document = session.carry_out(plan, progress)
    click.echo(saving.dump(document) if given["as_json"] else report.terminal(document), nl=False)
    if not any(run["completed"] for run in document.get("rounds", [document])):
        context.exit(1)


def _named(text: str) -> tuple[str | None, str]:
    """``ours=http://…`` → ``("ours", "http://…")``; an address may have its own ``=``, a name has no ``/``."""
    name, equals, rest = text.partition("=")
    return (name.strip(), rest.strip()) if equals and name.strip() and "/" not in name else (None, text.strip())


def _targets(urls: tuple[str, ...], models: tuple[str, ...]) -> list[tuple[str, str, str | None]]:
    """Name, address and model of each server."""
    servers: list[tuple[str, str]] = []
    for text in urls:
        name, url = _named(text)
        servers.append((name or url.partition("://")[2].rstrip("/").removesuffix("/v1") or url, url))
    names = [name for name, _ in servers]
    by_name: dict[str | None, str] = {}
    for text in models:
        name, model = _named(text)
        if name is not None and name not in names:
            # an id may hold an equals sign
            name, model = None, text
        if name in by_name:
            raise OptionError(f"--model {text}: given twice; keep one" + (f" for {name}" if name else ""))
        by_name[name] = model
    return [(name, url, by_name.get(name, by_name.get(None))) for name, url in servers]


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise OptionError(f"--extra-body {text!r:.80}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise OptionError(f'--extra-body {text!r:.80}: must be a JSON object, as in {{"top_p": 0.9}}')
    return found


def _metadata(pairs: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"--metadata {pair}: write KEY=VALUE")
        found[key.strip()] = value.strip()
    return found
