"""``accel bench``: options to a benchmark run and its reports. Knows nothing of how anything is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from accel.cli.bench_serve import serve
from accel.cli.common import (
    DEFAULT_CARTRIDGE,
    DEFAULT_DRAFT,
    DEFAULT_LAWCAT,
    DEFAULT_MASKED,
    DEFAULT_MASKED_BASE,
    DEFAULT_MODEL,
    DEFAULT_RETRIEVAL,
    Progress,
    command_line,
    use_threads,
)
from accel.errors import OptionError, unknown_name

if TYPE_CHECKING:
    from accel.bench.runner import Settings
    from accel.bench.session import Plan
    from accel.bench.workloads import Prompt

FILE = click.Path(dir_okay=False, path_type=Path)

_ALWAYS = {"suite", "threads", "device", "as_json", "output"}
_ASKING = _ALWAYS | {"model", "dtype", "artifacts", "limit", "max_new_tokens", "repeat", "seed", "resume"}
_ASKING |= {"html_file", "save_detailed"}
# suite → the options that it uses; any other is refused
USES = {
    "default": _ASKING | {"turns", "arms", "temperature"},
    "spec-bench": _ASKING | {"turns", "arms", "temperature", "prompt_file"},
    "drafts": _ASKING | {"prompt_file", "draft_length", "svg_file"},
    "lenience": _ASKING | {"prompt_file", "draft_length", "svg_file", "temperature", "epsilon"},
    "cartridge": _ALWAYS
    | {"model", "dtype", "artifacts", "prompt_file", "corpora", "limit", "max_new_tokens"}
    | {"concurrency", "repeat"},
    "dparallel": _ALWAYS
    | {"model", "dtype", "artifacts", "prompt_file", "limit", "max_new_tokens"}
    | {"rows", "timed", "repeat", "no_sweep", "svg_file"},
    "lawcat": _ALWAYS
    | {"model", "dtype", "artifacts", "prompt_file", "corpora", "limit", "max_new_tokens", "concurrency", "repeat"}
    | {"lengths", "digits", "seed", "html_file", "svg_file"},
    "cascade": _ALWAYS
    | {"model", "dtype", "limit", "repeat", "seed", "tasks", "teacher", "accuracy", "temperature", "svg_file"}
    | {"collect", "embedder", "prices", "key_variable"},
    "steps": _ALWAYS | {"model", "dtype"},
    "kernels": _ALWAYS | {"arms"},
}


class BenchGroup(click.Group):
    """A command that measures by itself, and has subcommands too: their names come first, before any option."""

    # as of a command: a group would end its options at the first argument
    allow_extra_args = False
    allow_interspersed_args = True

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self.commands:
            own = self.context_class(self, info_name=info_name, parent=parent, **extra)
            return self.commands[args[0]].make_context(args[0], args[1:], parent=own)
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return click.Command.parse_args(self, ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        return click.Command.invoke(self, ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return click.Command.collect_usage_pieces(self, ctx)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        # asked for a subcommand's full name too, in which no MODEL stands
        return super().get_params(ctx) if ctx.command is self else []


@click.group("bench", cls=BenchGroup, no_args_is_help=False)
@click.argument("model", required=False)
@click.option(
    "-a",
    "--artifact",
    "artifacts",
    multiple=True,
    metavar="ARTIFACT",
    help="A draft model, folder or name; several with --suite drafts. With --suite cartridge: cartridges; A+B are two "
    "that stand together. With --suite dparallel: the model that MODEL was distilled from. With --suite lawcat: the "
    "conversion. [default model: what ships with it]",
)
@click.option(
    "--suite",
    help="default (embedded prompts), spec-bench (reads --prompts), drafts, lenience, cartridge, dparallel, lawcat, "
    "cascade, steps, kernels.",
)
@click.option(
    "--prompts",
    "prompt_file",
    type=FILE,
    help="JSON lines: question_id, category, turns (Spec-Bench), or question, answer, category (as GSM8K).",
)
@click.option(
    "--corpus",
    "corpora",
    type=FILE,
    metavar="FILE",
    multiple=True,
    help="cartridge: the document that the cartridges stand in for; repeatable. lawcat: a text for its perplexity.",
)
@click.option(
    "--limit",
    type=int,
    help="Prompts of each task group; lawcat: tasks of each kind and length; cascade: of each kind and seed. [embedded "
    "prompts: 1; from a file: all; lawcat, cascade: 8]",
)
@click.option("--turns", type=int, default=1, show_default=True, help="Turns to ask of prompts that have several.")
@click.option(
    "--max-new-tokens",
    type=int,
    help="Tokens to generate. [default suite: 64; spec-bench: 128; drafts: 96; lenience: 256; cartridge: 24; "
    "lawcat: 32; dparallel: what MODEL was trained with, else 256]",
)
@click.option("--arms", metavar="A,B,…", help="Only these arms of the table, by name; kernels: only these families.")
@click.option(
    "--repeat", type=int, help="Runs of each arm on each prompt; cascade: seeds. [default: 1; timings, cascade: 3]"
)
@click.option(
    "--concurrency", metavar="N,N,…", help="cartridge, lawcat: requests at once. [default: 1,4,16; lawcat: 1,4]"
)
@click.option(
    "--lengths",
    metavar="N,N,…",
    help="lawcat: tokens of the prompts. [default: 1, 2, 4, 8, 16 times the trained length]",
)
@click.option("--digits", type=int, default=5, show_default=True, help="lawcat: of the numbers to be found again.")
@click.option("--rows", type=int, default=16, show_default=True, help="dparallel: questions that decode together.")
@click.option("--timed", type=int, default=32, show_default=True, help="dparallel: questions answered by the clock.")
@click.option("--no-sweep", is_flag=True, help="dparallel: leave out the other thresholds, and the plot.")
@click.option(
    "--temperature",
    type=float,
    help="0 is greedy; above, sample. [0; lenience: 1; drafts: always both; cascade, the student's: 0.3]",
)
@click.option("--tasks", metavar="A,B,…", help="cascade: only these of household, labels, extraction.")
@click.option("--teacher", metavar="MODEL@URL", help="cascade: an OpenAI-compatible endpoint. [default: simulated]")
@click.option(
    "--accuracy", type=float, default=0.97, show_default=True, help="cascade: of each answer of the simulated teacher."
)
@click.option(
    "--collect", type=int, default=150, show_default=True, help="cascade: tasks that demonstrations come from."
)
@click.option("--embedder", metavar="FOLDER", help="cascade: a sentence model that finds demonstrations.")
@click.option("--prices", type=FILE, help="cascade: JSON prices by model.")
@click.option("--key-variable", metavar="NAME", help="cascade: environment variable with the endpoint's key.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of sampled runs, of lawcat's and cascade's tasks."
)
@click.option(
    "--draft-length",
    metavar="N[,N…]",
    default="3",
    show_default=True,
    help="drafts and lenience: tokens drafted a round; drafts takes several.",
)
@click.option(
    "--epsilon", metavar="E[,E…]", default="0.5,0.2,0.05", show_default=True, help="lenience: the ε of each rule."
)
@click.option("--threads", type=int, help="CPU threads of torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--output", type=FILE, help="Save the JSON document here, again after every prompt.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --output, same options.")
@click.option("--html", "html_file", type=FILE, help="Save a self-contained page with tables and bars or plots.")
@click.option(
    "--svg",
    "svg_file",
    type=FILE,
    help="drafts, lenience, dparallel, lawcat, cascade: the plots alone. [dparallel: beside --output]",
)
@click.option("--save-detailed", is_flag=True, help="Keep every run's tokens and times in the document.")
@click.pass_context
def bench(context: click.Context, model: str | None, suite: str | None, **given: Any) -> None:
    """Measure MODEL with transformers' own generate and with accel, on the same weights and prompts.

    Every arm runs on every prompt, side by side. A speed-up is given only where the output is the same. An option
    that a suite does not use is refused.

    `drafts` compares draft models, greedy and at temperature 1, with each other and with what theory promises.
    `lenience` shows what lossy acceptance of a draft's tokens gains and what it costs in quality. `cartridge` asks
    --prompts (question and answer) without --corpus, with all of it in the prompt, and behind each cartridge.
    `dparallel` asks a masked-diffusion MODEL: one token a forward, by its threshold, with caches, and the model (-a)
    that it was distilled from. `lawcat` holds MODEL with a conversion (-a) against MODEL without it: numbers found
    again in long texts, perplexity, reading and decoding by length, and the length from which it is the faster one.
    `cascade` holds a student (MODEL) with a teacher's demonstrations, and cascades of the two, against either alone:
    success and $ on tasks with exact checkers.
    `steps` measures what one target step costs by the number of positions it verifies. `kernels` takes no MODEL: it
    times every kernel family on --device against the machine's own bandwidth and other implementations.

    `accel bench serve` puts load on servers instead, this one's or any other that speaks OpenAI's protocol.
    """
    # a file without a suite holds prompts for the usual arms
    suite = suite or ("spec-bench" if given["prompt_file"] else "default")
    _refuse_unused(context, suite)
    model = model or {"dparallel": DEFAULT_MASKED, "lawcat": DEFAULT_RETRIEVAL}.get(suite, DEFAULT_MODEL)
    if suite == "steps":
        _bench_steps(model, given["threads"], given["device"], given["dtype"], given["as_json"], given["output"])
    elif suite == "cartridge":
        _bench_cartridge(model, given)
    elif suite == "dparallel":
        _bench_dparallel(model, given)
    elif suite == "lawcat":
        _bench_lawcat(model, given)
    elif suite == "cascade":
        _bench_cascade(model, given)
    elif suite == "kernels":
        _bench_kernels(given["arms"], given["threads"], given["device"], given["as_json"], given["output"])
    else:
        _bench_prompts(model, suite, given)


bench.add_command(serve)


def _refuse_unused(context: click.Context, suite: str) -> None:
    if suite not in USES:
        raise OptionError(unknown_name("suite", suite, USES))
    for parameter in context.command.params:
        name = parameter.name
        was_given = name and context.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
        if was_given and name not in USES[suite]:
            what = parameter.opts[-1] if isinstance(parameter, click.Option) else "MODEL"
            users = ", ".join(other for other, uses in USES.items() if name in uses)
            raise OptionError(f"suite {suite!r} does not use {what}: leave it out (used by: {users})")


def _bench_prompts(model: str, suite: str, given: dict[str, Any]) -> None:
    """Suites that ask a model: the usual arms, drafts and lenience."""
    # torch takes seconds to import: not for --help
    from accel.bench import plot, saving, workloads
    from accel.bench.runner import Settings

    tokens, temperature = given["max_new_tokens"], given["temperature"]
    if temperature is None:
        temperature = 1.0 if suite == "lenience" else 0.0
    settings = Settings(
        max_new_tokens=workloads.suite(suite).max_new_tokens if tokens is None else tokens,
        temperature=temperature,
        seed=given["seed"],
        repeat=1 if given["repeat"] is None else given["repeat"],
        turns=given["turns"],
    )
    chosen = _suite(model, suite, settings, given)
    with Progress() as progress:
        document = chosen.carry_out(chosen.plan, _teller(progress))
    if given["html_file"]:
        saving.write(given["html_file"], chosen.page(document))
    if given["svg_file"]:
        saving.write(given["svg_file"], plot.page(chosen.charts(document)))
    click.echo(saving.dump(document) if given["as_json"] else chosen.terminal(document), nl=False)


class _Suite(NamedTuple):
    """A plan, what carries it out, and what shows the document."""

    plan: Plan
    carry_out: Callable[..., dict[str, Any]]
    terminal: Callable[[dict[str, Any]], str]
    page: Callable[[dict[str, Any]], str]
    charts: Callable[[dict[str, Any]], list[Any]] = lambda document: []


def _suite(model: str, suite: str, settings: Settings, given: dict[str, Any]) -> _Suite:
    from accel.bench import drafts, drafts_report, html, lenience, lenience_report, report, session

    names = ("artifacts", "prompt_file", "limit", "arms", "threads", "device", "dtype")
    common = {name: given[name] for name in (*names, "output", "resume", "save_detailed")}
    common |= {"model": model, "suite": suite, "settings": settings}
    if not common["artifacts"] and model == DEFAULT_MODEL:
        common["artifacts"] = (DEFAULT_DRAFT,)
    common["command"] = command_line()
    if suite == "drafts":
        compared = drafts.DraftsPlan(draft_lengths=_numbers("draft-length", given, int), **common)
        shown = drafts_report
        return _Suite(compared, drafts.carry_out, shown.terminal, shown.page, shown.charts)
    if suite == "lenience":
        lengths = _numbers("draft-length", given, int)
        if len(lengths) != 1:
            raise OptionError(f"--draft-length {given['draft_length']}: suite 'lenience' takes one")
        lossy = lenience.LeniencePlan(draft_length=lengths[0], epsilons=_numbers("epsilon", given, float), **common)
        return _Suite(lossy, lenience.carry_out, lenience_report.terminal, lenience_report.page, lenience_report.charts)
    return _Suite(session.Plan(**common), session.carry_out, report.terminal, html.page)


def _numbers(option: str, given: dict[str, Any], kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """``3,5`` → ``(3, 5)``."""
    text: str = given[option.replace("-", "_")]
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--{option} {text!r}: give numbers, separated by commas") from None


def _teller(progress: Progress) -> Callable[[int, int, Prompt, str], None]:
    """Progress as one line, with the time that is left at the pace so far."""
    started = time.monotonic()

    def told(done: int, total: int, prompt: Prompt, arm: str) -> None:
        nonlocal started
        if done == 0:
            # loading is over, or another stage begins
            started = time.monotonic()
        left = f" · about {(time.monotonic() - started) / done * (total - done):.0f} s left" if done else ""
        progress(f"{done}/{total} · prompt {prompt.id} ({prompt.category}) · {arm}{left}")

    return told


def _bench_steps(model: str, threads: int | None, device: str, dtype: str, as_json: bool, output: Path | None) -> None:
    from accel import detach, load
    from accel.bench import saving, steps

    use_threads(threads)
    loaded = detach(load(model, device=device, dtype=dtype).model)
    document = {"command": command_line(), "model": model, **steps.measure(loaded)}
    if output:
        saving.write(output, saving.dump(document))
    click.echo(saving.dump(document) if as_json else steps.terminal(document), nl=False)


def _bench_cartridge(model: str, given: dict[str, Any]) -> None:
    asked = {"-a": given["artifacts"], "--corpus": given["corpora"], "--prompts": given["prompt_file"]}
    lacking = [option for option, value in asked.items() if not value]
    embedded = len(lacking) == len(asked) and model == DEFAULT_MODEL
    if lacking and not embedded:
        raise OptionError(
            f"suite 'cartridge' needs {', '.join(lacking)}: cartridges (-a), their documents (--corpus) and questions "
            f"with answers (--prompts); {DEFAULT_MODEL} brings its own where all three are left out"
        )
    from accel.bench import cartridge, saving

    corpus, questions = cartridge.EMBEDDED
    use_threads(given["threads"])
    chosen = {name: given[name] for name in ("max_new_tokens", "repeat") if given[name] is not None}
    if given["concurrency"] is not None:
        chosen["concurrency"] = _counts("concurrency", given)
    plan = cartridge.Plan(
        model=model,
        artifacts=(DEFAULT_CARTRIDGE,) if embedded else given["artifacts"],
        corpora=(corpus,) if embedded else given["corpora"],
        questions=questions if embedded else given["prompt_file"],
        limit=given["limit"],
        **chosen,
        device=given["device"],
        dtype=given["dtype"],
        output=given["output"],
        command=command_line(),
    )
    with Progress() as progress:
        document = cartridge.carry_out(plan, progress)
    click.echo(saving.dump(document) if given["as_json"] else cartridge.terminal(document), nl=False)


def _bench_dparallel(model: str, given: dict[str, Any]) -> None:
    from accel.bench import dparallel, dparallel_report, plot, saving

    bases, output, drawn = given["artifacts"], given["output"], given["svg_file"]
    if len(bases) > 1:
        raise OptionError(f"-a {', '.join(bases)}: suite 'dparallel' takes the one that MODEL was distilled from")
    if given["no_sweep"] and drawn:
        raise OptionError(f"--svg {drawn} with --no-sweep: the plot is of the sweep; leave one of them out")
    if output and not drawn and not given["no_sweep"]:
        drawn = output.with_suffix(".svg")
    if output and drawn == output:
        raise OptionError(f"--output {output}: the JSON document and the plot cannot be one file; name it .json")
    if not bases and model == DEFAULT_MASKED:
        bases = (DEFAULT_MASKED_BASE,)
    use_threads(given["threads"])
    chosen = {name: given[name] for name in ("limit", "max_new_tokens", "rows", "timed", "repeat", "device", "dtype")}
    plan = dparallel.Plan(
        model=model,
        base=bases[0] if bases else None,
        questions=given["prompt_file"] or dparallel.EMBEDDED,
        sweep=not given["no_sweep"],
        **{name: value for name, value in chosen.items() if value is not None},
        output=output,
        command=command_line(),
    )
    with Progress() as progress:
        document = dparallel.carry_out(plan, progress)
    if drawn:
        saving.write(drawn, plot.page(dparallel_report.charts(document)))
    click.echo(saving.dump(document) if given["as_json"] else dparallel_report.terminal(document), nl=False)


def _bench_lawcat(model: str, given: dict[str, Any]) -> None:
    artifacts: tuple[str, ...] = given["artifacts"] or ((DEFAULT_LAWCAT,) if model == DEFAULT_RETRIEVAL else ())
    if len(artifacts) != 1:
        raise OptionError("suite 'lawcat' holds one conversion against MODEL: name it with -a")
    if len(given["corpora"]) > 1:
        raise OptionError(f"--corpus {', '.join(map(str, given['corpora']))}: suite 'lawcat' takes one text")
    from accel.bench import lawcat, lawcat_report, plot, saving

    use_threads(given["threads"])
    chosen = {name: given[name] for name in ("limit", "max_new_tokens", "repeat") if given[name] is not None}
    chosen |= {name: _counts(name, given) for name in ("concurrency", "lengths") if given[name] is not None}
    if given["corpora"]:
        chosen["corpus"] = given["corpora"][0]
    plan = lawcat.Plan(
        model=model,
        artifact=artifacts[0],
        questions=given["prompt_file"],
        **chosen,
        **{name: given[name] for name in ("digits", "seed", "device", "dtype", "output")},
        command=command_line(),
    )
    with Progress() as progress:
        document = lawcat.carry_out(plan, progress)
    if given["html_file"]:
        saving.write(given["html_file"], lawcat_report.page(document))
    if given["svg_file"]:
        saving.write(given["svg_file"], plot.page(lawcat_report.charts(document)))
    click.echo(saving.dump(document) if given["as_json"] else lawcat_report.terminal(document), nl=False)


def _bench_cascade(model: str, given: dict[str, Any]) -> None:
    from accel.bench import cascade, cascade_report, plot, saving

    use_threads(given["threads"])
    chosen = {name: given[name] for name in ("limit", "repeat", "temperature") if given[name] is not None}
    if given["tasks"] is not None:
        chosen["workloads"] = tuple(part.strip() for part in given["tasks"].split(","))
    names = (
        "teacher",
        "accuracy",
        "collect",
        "embedder",
        "prices",
        "key_variable",
        "seed",
        "device",
        "dtype",
        "output",
    )
    plan = cascade.Plan(model, **chosen, **{name: given[name] for name in names}, command=command_line())
    with Progress() as progress:
        document = cascade.carry_out(plan, progress)
    if given["svg_file"]:
        saving.write(given["svg_file"], plot.page(cascade_report.charts(document)))
    click.echo(saving.dump(document) if given["as_json"] else cascade_report.terminal(document), nl=False)


def _counts(option: str, given: dict[str, Any]) -> tuple[int, ...]:
    text: str = given[option]
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise OptionError(f"--{option} {text}: whole numbers with commas between them are wanted, as in 1,4") from error


def _bench_kernels(arms: str | None, threads: int | None, device: str, as_json: bool, output: Path | None) -> None:
    from accel.bench import saving
    from accel.bench.kernels import families, report, suite

    use_threads(threads)
    started = time.monotonic()
    with Progress() as progress:
        document = suite.run(
            families.find_device(device),
            arms,
            command=command_line(),
            told=lambda done, total, case: progress(
                f"{done}/{total} · {time.monotonic() - started:.0f} s · {case.family}: {case.name}"
            ),
            save=lambda part: saving.write(output, report.dump(part)) if output else None,
        )
    click.echo(report.dump(document) if as_json else report.terminal(document), nl=False)
