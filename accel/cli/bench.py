"""``accel bench``: options to a benchmark run and its reports. Knows nothing of how anything is measured."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from accel.cli.common import DEFAULT_MODEL, Progress

if TYPE_CHECKING:
    from accel.bench.workloads import Prompt

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("bench")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("-a", "--artifact", "artifacts", multiple=True, metavar="ARTIFACT", help="A draft model: folder or name.")
@click.option("--suite", help="default (embedded prompts), spec-bench (reads --prompts), steps, or kernels.")
@click.option("--prompts", "prompt_file", type=FILE, help="Spec-Bench JSON lines: question_id, category, turns.")
@click.option("--limit", type=int, help="Prompts of each task group. [default suite: 1; spec-bench: all]")
@click.option("--turns", type=int, default=1, show_default=True, help="Turns to ask of prompts that have several.")
@click.option("--max-new-tokens", type=int, help="Tokens to generate. [default suite: 64; spec-bench: 128]")
@click.option("--arms", metavar="A,B,…", help="Only these arms of the table, by name; kernels: only these families.")
@click.option("--repeat", type=int, default=1, show_default=True, help="Runs of each arm on each prompt.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy; above, sample.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampled runs.")
@click.option("--threads", type=int, help="CPU threads of torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--output", type=FILE, help="Save the JSON document here, again after every prompt.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --output, same options.")
@click.option("--html", "html_file", type=FILE, help="Save a self-contained page with tables and bars.")
@click.option("--save-detailed", is_flag=True, help="Keep every run's tokens and times in the document.")
def bench(
    model: str,
    artifacts: tuple[str, ...],
    suite: str | None,
    prompt_file: Path | None,
    limit: int | None,
    turns: int,
    max_new_tokens: int | None,
    arms: str | None,
    repeat: int,
    temperature: float,
    seed: int,
    threads: int | None,
    device: str,
    dtype: str,
    as_json: bool,
    output: Path | None,
    resume: bool,
    html_file: Path | None,
    save_detailed: bool,
) -> None:
    """Measure MODEL with transformers' own generate and with accel, on the same weights and prompts.

    Every arm runs on every prompt, side by side. A speed-up is given only where the output is the same. The suite
    `steps` measures what one target step costs by the number of positions it verifies. The suite `kernels` takes no
    MODEL: it times every kernel family on --device against the machine's own bandwidth and other implementations.
    """
    if suite == "steps":
        _bench_steps(model, threads, device, dtype, as_json, output)
        return
    if suite == "kernels":
        _bench_kernels(arms, threads, device, as_json, output)
        return
    # torch takes seconds to import: not for --help
    from accel.bench import html, report, saving, session, workloads
    from accel.bench.runner import Settings

    # a file without a suite is in Spec-Bench's format
    suite = suite or ("spec-bench" if prompt_file else "default")
    plan = session.Plan(
        model=model,
        artifacts=artifacts,
        suite=suite,
        prompt_file=prompt_file,
        limit=limit,
        arms=arms,
        settings=Settings(
            max_new_tokens=workloads.suite(suite).max_new_tokens if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            seed=seed,
            repeat=repeat,
            turns=turns,
        ),
        threads=threads,
        device=device,
        dtype=dtype,
        output=output,
        resume=resume,
        save_detailed=save_detailed,
        command=shlex.join(["accel", *sys.argv[1:]]),
    )
    started = time.monotonic()

    def told(done: int, total: int, prompt: Prompt, arm: str) -> None:
        left = f" · about {(time.monotonic() - started) / done * (total - done):.0f} s left" if done else ""
        progress(f"{done}/{total} · prompt {prompt.id} ({prompt.category}) · {arm}{left}")

    with Progress() as progress:
        document = session.carry_out(plan, told)
    if html_file:
        saving.write(html_file, html.page(document))
    click.echo(saving.dump(document) if as_json else report.terminal(document), nl=False)


def _bench_steps(model: str, threads: int | None, device: str, dtype: str, as_json: bool, output: Path | None) -> None:
    import torch

    from accel import detach, load
    from accel.bench import saving, steps

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = detach(load(model, device=device, dtype=dtype).model)
    document = {"command": shlex.join(["accel", *sys.argv[1:]]), "model": model, **steps.measure(loaded)}
    if output:
        saving.write(output, saving.dump(document))
    click.echo(saving.dump(document) if as_json else steps.terminal(document), nl=False)


def _bench_kernels(arms: str | None, threads: int | None, device: str, as_json: bool, output: Path | None) -> None:
    import torch

    from accel.bench import saving
    from accel.bench.kernels import families, report, suite

    if threads is not None:
        torch.set_num_threads(threads)
    started = time.monotonic()
    with Progress() as progress:
        document = suite.run(
            families.find_device(device),
            arms,
            command=shlex.join(["accel", *sys.argv[1:]]),
            told=lambda done, total, case: progress(
                f"{done}/{total} · {time.monotonic() - started:.0f} s · {case.family}: {case.name}"
            ),
            save=lambda part: saving.write(output, report.dump(part)) if output else None,
        )
    click.echo(report.dump(document) if as_json else report.terminal(document), nl=False)
