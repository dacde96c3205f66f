"""``accel distill a2d | dparallel | calibrate``: options to recipes of masked-diffusion models, progress, reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from accel.cli.common import Command, Progress, command_line, emit, json_option, table, use_threads
from accel.cli.recipes import Run, all_of, device_options, folder_options, prompts_option, run_options
from accel.errors import OptionError


def _recipe_options(**own: Any) -> Callable[[Command], Command]:
    """The options that both recipes have; ``own``: the defaults that differ."""
    return all_of(
        folder_options(work="Answers and checkpoints"),
        click.option(
            "--data",
            default=own["data"],
            show_default=True,
            help="Who writes the answers: self (MODEL) or file.",
        ),
        click.option(
            "--check",
            default=own["check"],
            show_default=True,
            help="Which of its own answers MODEL learns: those whose final answer (behind ####, in \\boxed{}, else the "
            "last number) is the file's (final), or all that end (none). final also reports accuracy.",
        ),
        click.option(
            "--noise",
            default=own["noise"],
            show_default=True,
            help="What is hidden: half a block between clean and masked ones (blocks), half the answer (response), "
            "both with the other half in a second view; or a random share: of the answer, weighted by the bound on its "
            "probability (diffusion) or not (maskgit), or of one block between clean and masked ones (block).",
        ),
        click.option(
            "--canvas",
            default=own["canvas"],
            show_default=True,
            help="Positions behind a prompt: as many as --max-new-tokens (whole), or any number of blocks that the "
            "answer fits in (random).",
        ),
        click.option(
            "--beta",
            type=float,
            default=own["beta"],
            show_default=True,
            help="Weight of certainty: the entropy of tokens that are right already. 0 is cross entropy alone.",
        ),
        click.option(
            "--learning-rate", type=float, default=own["learning_rate"], show_default=True, help="At its peak."
        ),
        click.option(
            "--lora-rank",
            type=int,
            default=own["lora_rank"],
            show_default=True,
            help="Train additions of this rank, merged at the end; 0 trains all weights.",
        ),
        click.option("--lora-alpha", type=float, help="Scale of the additions. [default: the rank]"),
        click.option(
            "--lora-targets",
            default="all",
            show_default=True,
            metavar="A,B,…",
            help="Linear layers by the end of their names, as in q_proj,v_proj; all is every one but the head.",
        ),
        click.option("--rule", help="When a token counts as certain: entropy or confidence. [default: MODEL's own]"),
        click.option(
            "--threshold", type=float, help="Of the rule: nats or a probability. [default: MODEL's own, else 0.5]"
        ),
        click.option(
            "--block-length", type=int, help="Tokens that are filled together. [default: MODEL's own, else 32]"
        ),
        click.option(
            "--longest-prompt", type=int, default=256, show_default=True, help="Leave out prompts of more tokens."
        ),
        click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Length limit of answers."),
        click.option("--steps", type=int, default=1000, show_default=True, help="Training steps."),
        click.option(
            "--batch-tokens", type=int, default=4096, show_default=True, help="Tokens of a batch, padding and views."
        ),
        click.option("--checkpoint-every", type=int, default=100, show_default=True, help="Steps between checkpoints."),
        click.option("--rows", type=int, default=16, show_default=True, help="Prompts that decode together."),
        click.option(
            "--held-out", type=float, default=0.02, show_default=True, help="Share of the prompts to measure with."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of masks, batches and additions."),
        run_options(bounds="answers, checkpoints and artifact", plan="prompts, sizes and disk use"),
    )


@click.command("a2d")
@click.argument("model")
@prompts_option(", with answers beside them unless --data self")
@click.option(
    "--mask-token", metavar="TEXT", help="What stands for an open position. [default: the tokenizer's, or new]"
)
@click.option("--shift", is_flag=True, help="Position i goes on predicting token i + 1, as MODEL did.")
@_recipe_options(
    data="file", check="none", noise="diffusion", canvas="random", beta=0.0, learning_rate=1e-4, lora_rank=0
)
def a2d(**given: Any) -> None:
    """Make a masked-diffusion model of MODEL, a causal language model.

    The causal mask goes, a mask token comes, and MODEL learns to fill answers whose tokens are hidden at random. The
    result is a folder for `accel generate -m`, and a base for `accel distill dparallel`.
    """
    from accel.methods.dparallel.distill.recipe import Conversion

    _distill(Conversion, **given)


@click.command("dparallel")
@click.argument("model")
@prompts_option(" and an answer")
@_recipe_options(data="self", check="final", noise="blocks", canvas="whole", beta=2.0, learning_rate=2e-5, lora_rank=32)
def dparallel(**given: Any) -> None:
    """Make MODEL, a masked-diffusion model, certain of more tokens at once.

    MODEL answers the prompts; it then learns its own right answers with a loss that makes it certain of what it gets
    right. The result is a folder for `accel generate -m`; `accel distill calibrate` finds its threshold.
    """
    from accel.methods.dparallel.distill.recipe import DParallel

    _distill(DParallel, **given)


def _distill(cls: Any, *, prompt_files: tuple[Path, ...], lora_targets: str, **given: Any) -> None:
    run, choices = Run.of(given)
    from accel.distill.prompts import read
    from accel.methods.dparallel.distill.recipe import distill, prepare

    targets = tuple(part.strip() for part in lora_targets.split(",") if part.strip())
    recipe = cls(lora_targets=targets, **run.limits, **choices)
    prompts = read(prompt_files)
    with run.loaded("prompts") as (progress, model, tokenizer):
        prepared = prepare(model, tokenizer, prompts, recipe)
        if run.only_plan:
            progress("")
            run.tell(prepared.as_dict(), _plan_text(prepared.as_dict()))
            return
        artifact = distill(
            model,
            tokenizer,
            prompts,
            recipe,
            run.work_folder,
            run.target,
            progress,
            **run.signature,
            prepared=prepared,
        )
    run.report(artifact, prepared, f"{artifact.path}\n{_report(artifact.manifest.measured)}")


@click.command("calibrate")
@click.argument("artifact")
@prompts_option(" and an answer")
@click.option(
    "--budget",
    type=float,
    default=1.0,
    show_default=True,
    help="Points of accuracy that may be lost against one token a forward.",
)
@click.option("--thresholds", metavar="A,B,…", help="What to try. [default: nine values of the artifact's rule]")
@click.option(
    "--max-new-tokens", type=int, help="Length limit of answers. [default: what the artifact was trained with]"
)
@click.option("--longest-prompt", type=int, default=256, show_default=True, help="Leave out prompts of more tokens.")
@click.option("--rows", type=int, default=16, show_default=True, help="Prompts that decode together.")
@device_options("the model")
@click.option("--dry-run", is_flag=True, help="Report, and leave the artifact as it is.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also draw accuracy against tokens per forward, as SVG.",
)
@json_option
def calibrate(
    artifact: str,
    prompt_files: tuple[Path, ...],
    thresholds: str | None,
    max_new_tokens: int | None,
    longest_prompt: int,
    threads: int | None,
    device: str,
    dtype: str,
    dry_run: bool,
    plot_file: Path | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Find the threshold of ARTIFACT that is fastest within a budget of accuracy, and write it there.

    The artifact's own rule is tried at several thresholds on prompts with known answers. ARTIFACT's manifest and config
    then hold the chosen one, and the manifest the whole sweep.
    """
    tried = _numbers(thresholds)
    from accel.artifacts import resolve
    from accel.distill.prompts import read
    from accel.methods.dparallel.distill.calibrated import calibrate_artifact

    prompts = read(prompt_files)
    use_threads(threads)
    with Progress() as progress:
        found, written = calibrate_artifact(
            resolve(artifact),
            prompts,
            thresholds=tried,
            max_new_tokens=max_new_tokens,
            longest_prompt=longest_prompt,
            device=device,
            dtype=dtype,
            write=not dry_run,
            command=command_line(),
            progress=progress,
            **choices,
        )
    document = {"artifact": artifact, "written": written, **found.as_dict()}
    if plot_file is not None:
        _draw(plot_file, document)
    emit(document, _sweep_text(document), as_json=as_json)


def _draw(file: Path, found: dict[str, Any]) -> None:
    from accel.bench import dparallel_report, plot, saving

    saving.write(file, plot.page([dparallel_report.curves({"thresholds": [found["one"], *found["points"]]})]))


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip()) if text else ()
    except ValueError:
        raise OptionError(f"--thresholds {text!r}: give numbers, as in 0.1,0.3,0.5") from None


def _plan_text(plan: dict[str, Any]) -> str:
    disk = plan["disk"]
    facts = plan["facts"]
    return "\n".join(
        [
            f"prompts: {plan['prompts']} to learn from, {plan['held_out']} held out, {plan['too_long']} too long",
            f"model: {plan['parameters'] / 1e6:.2f}M parameters, {plan['trained'] / 1e6:.2f}M trained",
            f"mask token {facts['mask_token']}, blocks of {facts['block_length']}, {facts['rule']} at "
            f"{facts['threshold']}",
            f"disk: at most {disk['total'] / 1e6:.1f} MB (answers {disk['answers'] / 1e6:.1f}, checkpoints "
            f"{disk['checkpoints'] / 1e6:.1f}, artifact {disk['artifact'] / 1e6:.1f})",
        ]
    )


def _report(measured: dict[str, Any]) -> str:
    answers, hidden = measured["answers"], measured["hidden_tokens"]
    lines = [
        f"answers: {answers['kept']} of {answers['written']} learned ({answers['cut']} without an end, "
        f"{answers['wrong']} wrong); {measured['held_out_prompts']} prompts held out"
    ]
    if hidden["before"]:
        was, now = hidden["before"], hidden["after"]
        lines.append(
            f"hidden tokens: {was['correct']:.1%} → {now['correct']:.1%} right, cross entropy "
            f"{was['cross_entropy']:.3f} → {now['cross_entropy']:.3f}, entropy of right ones "
            f"{was['entropy_of_correct']:.4f} → {now['entropy_of_correct']:.4f}"
        )
    rows = [
        [who, how.replace("_", " "), *_cells(measured[who][how])]
        for who in ("teacher", "student")
        if who in measured
        for how in ("one_token", "threshold")
    ]
    return "\n".join([*lines, table(["", "rule", *_COLUMNS], rows)])


_COLUMNS = ("threshold", "accuracy", "tokens/forward", "forwards", "tokens")


def _cells(point: dict[str, Any]) -> list[str]:
    accuracy = point["accuracy"]
    return [
        f"{point['threshold']:g}",
        "-" if accuracy is None else f"{accuracy:.1f}",
        f"{point['tokens_per_forward']:.2f}",
        f"{point['forwards']:.1f}",
        f"{point['tokens']:.1f}",
    ]


def _sweep_text(found: dict[str, Any]) -> str:
    chosen = found["chosen"]
    rows = [["one token a forward", *_cells(found["one"])]]
    rows += [["chosen" if chosen == point else "", *_cells(point)] for point in found["points"]]
    lines = [table(["", *_COLUMNS], rows), f"AUP {found['aup']:.1f} over {found['prompts']} prompts"]
    if 100 / found["prompts"] > max(found["budget"], 1e-9) > 0:
        lines.append(f"one prompt is {100 / found['prompts']:.1f} points: more than the budget; give more prompts")
    if chosen is None:
        lines.append(f"every threshold loses more than {found['budget']:g} points: nothing was written")
    elif found["written"]:
        lines.append(f"{found['artifact']}: threshold {chosen['threshold']:g}")
    return "\n".join(lines)
