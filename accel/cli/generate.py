"""``accel generate``: text from a model and its artifacts, streamed, with the figures of the call on request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accel.cli.common import (
    DEFAULT_MODEL,
    Progress,
    artifact_option,
    emit,
    json_option,
    model_option,
    options_option,
    output_option,
    parse_bytes,
)
from accel.errors import OptionError

if TYPE_CHECKING:
    from accel import Model, Stats
    from accel.methods.cascade.router import Answer


@click.command(short_help="Generate text with a model and its artifacts.")
@click.argument("prompt", required=False)
@model_option
@artifact_option
@options_option
@click.option("--method", metavar="NAME", help="Decoding method, see `accel methods`. [default: the one for the model]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Length limit.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among the k most likely tokens.")
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--stats", "show_stats", is_flag=True, help="Print the figures of the call on stderr.")
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Append the token ids of prompt and answer to FILE, for `accel distill draft --prompts FILE`. [default: none]",
)
@click.option(
    "--log-max-size",
    metavar="SIZE",
    help="Bound on FILE and the older rows in NAME.1.SUFFIX, together. [default: 100MB]",
)
@json_option
@output_option
def generate(
    prompt: str | None,
    model: str | None,
    artifact: tuple[str, ...],
    options: dict[str, Any],
    method: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    raw: bool,
    device: str,
    dtype: str,
    show_stats: bool,
    log: Path | None,
    log_max_size: str | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Generate text for PROMPT, or for what is piped in. The answer streams to stdout."""
    text = prompt if prompt is not None else _piped()
    if seed is not None:
        options = {**options, "seed": seed}
    if log is not None:
        options = {**options, "log": log}
    if log_max_size is not None:
        options = {**options, "log_max_bytes": parse_bytes(log_max_size)}
    if method == "cascade":
        if raw or top_p is not None or top_k is not None:
            raise OptionError(
                "--raw, --top-p and --top-k do not go with method 'cascade': it asks in messages and decodes as -o says"
            )
        told: dict[str, Any] = {"max_tokens": max_new_tokens, "device": device, "dtype": dtype}
        if temperature > 0:
            told["temperature"] = temperature
        _cascade(model or DEFAULT_MODEL, artifact, text, told | options, show_stats, as_json, output)
        return
    sampling = _sampling(temperature, top_p, top_k)
    import accel

    with Progress() as progress:
        progress("loading the model …")
        loaded = accel.load(model or DEFAULT_MODEL, artifact, device=device, dtype=dtype, method=method, **options)
    pieces: list[str] = []
    for piece in _pieces(loaded, text, raw, max_new_tokens=max_new_tokens, **sampling):
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    figures = loaded.stats
    document = {"model": model or DEFAULT_MODEL, "prompt": text, "text": "".join(pieces), "stats": figures.as_dict()}
    emit(document, "", as_json=as_json, output=output)
    if show_stats:
        click.echo(_summary(figures), err=True)


def _cascade(
    student: str,
    artifacts: tuple[str, ...],
    text: str,
    options: dict[str, Any],
    show_stats: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """The answer of a cascade, and on request who gave it and what it cost."""
    import accel

    with Progress() as progress:
        progress("loading the student …")
        cascade = accel.cascade(student, artifacts, **options)
        progress("asking …")
        answer = cascade.ask(text)
    emit({"model": student, "prompt": text, **answer.as_dict()}, answer.text, as_json=as_json, output=output)
    if show_stats:
        click.echo(_account(answer), err=True)


def _account(answer: Answer) -> str:
    ledger, verdict = answer.ledger, answer.verdict
    parts = [
        f"{answer.decision}: {answer.model} answered in {answer.seconds:.2f} s",
        f"{verdict.votes} of {verdict.taken} samples agree",
        f"{len(answer.found)} demonstrations",
        "cost unknown: a model has no price" if ledger.cost is None else f"${ledger.cost:.6f}",
    ]
    if ledger.saved is not None:
        parts.append(f"${ledger.saved:.6f} saved{' (estimated)' if ledger.estimated else ''}")
    return " · ".join([*parts, *answer.notes])


def _piped() -> str:
    if sys.stdin.isatty():
        raise OptionError('no prompt: give one, as in accel generate "Why is the sky blue?", or pipe one in')
    text = sys.stdin.read().strip()
    if not text:
        raise OptionError("the prompt is empty: give at least one word")
    return text


def _sampling(temperature: float, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    if temperature == 0:
        if top_p is not None or top_k is not None:
            raise OptionError("--top-p and --top-k need sampling: set --temperature above 0 as well")
        return {"do_sample": False}
    chosen = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k if top_k is not None else 0}
    return {name: value for name, value in chosen.items() if value is not None}


def _pieces(loaded: Model, text: str, raw: bool, **settings: Any) -> Iterator[str]:
    if raw:
        yield loaded.generate(text, **settings)
    else:
        yield from loaded.stream(text, **settings)


def _forwards(stats: Stats) -> str:
    return f"{stats.tokens_per_forward:.2f} tokens a forward ({stats.target_calls} forwards)"


def _summary(stats: Stats) -> str:
    seconds = sum(stats.seconds.values())
    parts = [
        f"{stats.generated_tokens} tokens in {seconds:.2f} s",
        f"{stats.generated_tokens / max(seconds, 1e-9):.1f} tokens/s",
        f"{stats.method}, {'lossless' if stats.lossless else 'lossy'}",
        f"τ {stats.mean_accepted_length:.2f}" if stats.method != "dparallel" else _forwards(stats),
    ]
    if stats.acceptance_rate is not None:
        parts.append(f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens accepted")
    return " · ".join([*parts, *stats.notes])
