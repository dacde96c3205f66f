"""``accel distill``: options to a recipe, progress, and a report. Knows nothing of how anything is learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accel.cli import distill_demos, distill_lawcat, distill_masked
from accel.cli.common import DEFAULT_MODEL, parse_layers
from accel.cli.recipes import Run, folder_options, prompts_option, run_options

if TYPE_CHECKING:
    from accel.artifacts import Artifact
    from accel.methods.speculative.distill.plan import Prepared
    from accel.methods.speculative.distill.recipe import Recipe

# widths to compare with the one that was asked for
_WIDTHS = (192, 320, 576)


@click.group("distill")
def distill() -> None:
    """Make artifacts for a model: learn from what it says."""


@distill.command("draft")
@click.argument("model", default=DEFAULT_MODEL)
@prompts_option("; or what `accel generate --log` wrote, with its older NAME.1.SUFFIX")
@folder_options(work="Lessons and checkpoints")
@click.option("--shape", metavar="LxH", help="Layers and width of the draft. [default: 1x576]")
@click.option("--layers", metavar="A,B,…", help="Make the draft of these layers of MODEL instead.")
@click.option("--start", default="target", show_default=True, help="First embeddings: target (projected) or random.")
@click.option(
    "--lags",
    type=int,
    default=0,
    show_default=True,
    help="Tokens before each one that the draft's embedding adds to it: 2 let one layer copy.",
)
@click.option(
    "--copying",
    type=float,
    default=0.0,
    show_default=True,
    help="Weight of learning to say again what was said before; needs --lags.",
)
@click.option(
    "--from",
    "begun",
    metavar="ARTIFACT",
    help="A draft of MODEL to train on, with its shape and vocabulary. [default: a new one]",
)
@click.option("--vocabulary", type=int, default=8192, show_default=True, help="Tokens that the draft can say.")
@click.option(
    "--data",
    default="target",
    show_default=True,
    help="Who writes answers: target, fixed (the file), draft; at a temperature of its own (target@0,target@1); "
    "a mix (target:0.5,draft:0.5); a change (target>draft).",
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Of written answers, unless --data says; 0 is greedy.",
)
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Length limit of answers.")
@click.option("--longest-prompt", type=int, default=512, show_default=True, help="Leave out prompts of more tokens.")
@click.option("--k", type=int, default=32, show_default=True, help="Tokens of MODEL's distribution kept a position.")
@click.option("--loss", default="lk", show_default=True, help="fkl, rkl, jsd, tvd, nla (−ln α) or lk (hybrid).")
@click.option("--beta", type=float, default=0.5, show_default=True, help="Of jsd: between fkl's side and rkl's.")
@click.option("--keep", type=float, default=1.0, show_default=True, help="Share of tokens to learn, as in AdaSPEC.")
@click.option("--baseline", is_flag=True, help="Learn the next token alone: what an undistilled draft would be.")
@click.option("--steps", type=int, default=1000, show_default=True, help="Training steps.")
@click.option("--batch-tokens", type=int, default=4096, show_default=True, help="Tokens of a batch, with padding.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="At its peak.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of answers, batches and first weights.")
@run_options(bounds="lessons, checkpoints and artifact", plan="disk use and what drafts would cost here")
def draft(prompt_files: tuple[Path, ...], layers: str | None, begun: str | None, **given: Any) -> None:
    """Make a draft model for MODEL from prompts like those that it will be asked.

    MODEL answers the prompts; a small student learns its distribution at every position and is measured on prompts
    that were held out. The result is an artifact for `accel generate -a` and `accel bench -a`. A run that was killed
    goes on when it is called again.
    """
    run, choices = Run.of(given)
    # torch takes seconds to import: not for --help
    from accel.artifacts import open_artifact, resolve
    from accel.distill.prompts import read
    from accel.methods.speculative.distill.plan import prepare
    from accel.methods.speculative.distill.recipe import Recipe, distill_draft

    recipe = Recipe(layers=() if layers is None else parse_layers(layers), **run.limits, **choices)
    prompts = read(prompt_files)
    before = None if begun is None else open_artifact(resolve(begun))
    with run.loaded("prompts") as (progress, target, tokenizer):
        prepared = prepare(target, tokenizer, prompts, recipe, before)
        if run.only_plan:
            progress("measuring candidate shapes …")
            costs = _costs(target, recipe)
            document = prepared.as_dict() | {"candidates": costs["candidates"], "verify": costs["verify"]}
            progress("")
            head = "predicted speed-up @ draft length, by rate of acceptance α:"
            run.tell(document, f"{_plan_text(prepared)}\n\n{head}\n{costs['table']}")
            return
        artifact = distill_draft(
            target,
            tokenizer,
            prompts,
            recipe,
            run.work_folder,
            run.target,
            progress,
            **run.signature,
            prepared=prepared,
            begun=before,
        )
    run.report(artifact, prepared, _report(artifact, prepared))


@distill.command("cartridge")
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--corpus",
    "corpus_files",
    multiple=True,
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The document, as UTF-8 text. Repeatable: cartridges of one call learn to stand together.",
)
@folder_options(work="Conversations and checkpoints", output="The artifact to write; of several, their parent.")
@click.option("--tokens", type=int, help="Slots of the cartridge: what stands in for the document.")
@click.option("--compression", type=float, help="Or: tokens of the document for one slot, as in 16.")
@click.option(
    "--method",
    default="self-study",
    show_default=True,
    help="self-study (trained), compact (fitted in seconds, worse) or whole (every token, exact).",
)
@click.option("--instruction", default="", help="What stands in front of the document in its message.")
@click.option(
    "--template",
    default="system",
    show_default=True,
    help="The document is a system message (system) or stands in front of plain text (text).",
)
@click.option("--start", default="chunks", show_default=True, help="First slots: chunks, first or random.")
@click.option(
    "--from",
    "begun",
    multiple=True,
    metavar="ARTIFACT",
    help="A cartridge of one of the documents, to go on with instead. Repeatable.",
)
@click.option("--sink-tokens", type=int, default=1, show_default=True, help="First slots that training leaves alone.")
@click.option(
    "--conversations",
    type=int,
    multiple=True,
    default=(1024,),
    show_default=True,
    help="Of MODEL with itself, about the longest document, and about others in proportion; or once for each --corpus.",
)
@click.option("--shortest-chunk", type=int, default=256, show_default=True, help="Tokens in view of a conversation…")
@click.option("--longest-chunk", type=int, default=1024, show_default=True, help="… at random between these.")
@click.option("--per-chunk", type=int, default=16, show_default=True, help="Conversations about one piece.")
@click.option("--question-tokens", type=int, default=48, show_default=True, help="Length limit of questions.")
@click.option("--answer-tokens", type=int, default=96, show_default=True, help="Length limit of answers.")
@click.option("--k", type=int, default=32, show_default=True, help="Tokens of MODEL's distribution kept a position.")
@click.option("--rows", type=int, default=32, show_default=True, help="Conversations that decode at once.")
@click.option("--steps", type=int, default=400, show_default=True, help="Training steps.")
@click.option("--checkpoint-every", type=int, default=50, show_default=True, help="Steps that a kill loses at most.")
@click.option("--batch-tokens", type=int, default=2048, show_default=True, help="Tokens of a batch, with padding.")
@click.option("--learning-rate", type=float, default=0.02, show_default=True, help="At its peak.")
@click.option(
    "--together",
    type=float,
    default=0.5,
    show_default=True,
    help="Of several documents: share of the steps in which all cartridges stand together.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of questions, pieces, batches.")
@run_options(bounds="conversations, checkpoints, artifacts", plan="tokens, slots and disk use")
def cartridge(
    corpus_files: tuple[Path, ...], begun: tuple[str, ...], conversations: tuple[int, ...], **given: Any
) -> None:
    """Make a cartridge of a document: a small key-value cache that stands in for it in front of prompts."""
    run, choices = Run.of(given, several=len(corpus_files) > 1)
    from accel.artifacts import open_artifact, resolve
    from accel.methods.cartridge.distill.recipe import Recipe, distill_cartridges, prepare, read_corpora, summary

    asked = conversations[0] if len(conversations) == 1 else conversations
    recipe = Recipe(conversations=asked, **run.limits, **choices)
    corpora = read_corpora(corpus_files, recipe)
    with run.loaded("documents") as (progress, target, tokenizer):
        prepared = prepare(target, tokenizer, corpora, recipe)
        if run.only_plan:
            progress("")
            run.tell(prepared.as_dict(), _cartridge_plan(prepared.as_dict()))
            return
        outputs = [run.target] if len(corpora) == 1 else [run.target / each.name for each in corpora]
        artifacts = distill_cartridges(
            target,
            tokenizer,
            corpora,
            recipe,
            run.work_folder,
            outputs,
            progress,
            **run.signature,
            prepared=prepared,
            begun=[open_artifact(resolve(each)) for each in begun],
        )
    rows = summary(artifacts, prepared)
    lines = [
        f"{row['path']}: {row['slots']} slots for {row['tokens']} tokens ({row['compression']}x)"
        + (
            f"; divergence on {row['held_out']} held-out conversations {row['divergence_before']} → {row['divergence']}"
            if row.get("held_out")
            else ""
        )
        for row in rows
    ]
    run.tell({"artifacts": rows, **prepared.as_dict()}, "\n".join(lines))


def _cartridge_plan(document: dict[str, Any]) -> str:
    disk = document["disk"]
    rows = [
        f"{each['name']}: {each['slots']} slots for {each['tokens']} tokens ({each['compression']}x)"
        + (f", {each['conversations']} conversations" if "conversations" in each else "")
        for each in document["documents"]
    ]
    parts = ", ".join(f"{name} {_size(disk[name])}" for name in ("lessons", "checkpoints", "artifacts"))
    return "\n".join([*rows, f"disk: at most {_size(disk['total'])} ({parts})"])


def _costs(target: Any, recipe: Recipe) -> dict[str, Any]:
    """What the asked shape and a few others cost a token on this machine, in target steps."""
    from dataclasses import asdict

    from accel.methods.speculative.distill import cost
    from accel.methods.speculative.distill.student import HEAD_SIZES, Shape

    size = target.config.get_text_config(decoder=True)
    asked = recipe.student_shape or Shape.of_layers(target, len(recipe.layers))
    widths = [width for width in _WIDTHS if width <= size.hidden_size] or [size.hidden_size]
    shapes = [Shape.of(layers, width) for layers in (1, 2) for width in widths if width % HEAD_SIZES[-1] == 0]
    if asked not in shapes:
        shapes.insert(0, asked)
    candidates = cost.measure(target, shapes, min(recipe.vocabulary, size.vocab_size))
    # several positions cost a target more than one, on a CPU above all
    verify = cost.measure_verify(target)
    rows = [asdict(each) | {"shape": str(each.shape)} for each in candidates]
    return {"candidates": rows, "verify": verify, "table": cost.table(candidates, verify=verify)}


def _plan_text(prepared: Prepared) -> str:
    disk = prepared.disk
    lines = [
        f"prompts: {len(prepared.kept.prompts)} to learn from, {len(prepared.held_out.prompts)} held out, "
        f"{prepared.num_too_long} too long",
        f"draft: {prepared.parameters / 1e6:.2f}M parameters",
        f"disk: at most {_size(disk.total)} of the {_size(disk.max_bytes)} allowed",
        *(f"  {folder}: {_size(size)}" for folder, size in disk.lessons.items()),
        f"  checkpoints: {_size(disk.checkpoints)}",
        f"  artifact: {_size(disk.artifact)}",
    ]
    if disk.wanted > disk.max_bytes:
        lines.append(f"  all answers at full length would take {_size(disk.wanted)}: the last prompts may get none")
    return "\n".join(lines)


def _report(artifact: Artifact, prepared: Prepared) -> str:
    measured = artifact.manifest.measured
    lines = [
        f"{artifact.path}: {prepared.parameters / 1e6:.2f}M parameters",
        f"held out: {measured['held_out_prompts']} prompts; the draft can say {measured['coverage']:.1%} of the tokens",
    ]
    if prepared.num_too_long:
        lines.append(f"left out: {prepared.num_too_long} prompts that were too long")
    for kind, agreement in (("greedy", "top1"), ("sampled", "acceptance")):
        found = measured[kind]
        name = {"top1": "top-1 agreement", "acceptance": "α = 1 − TVD"}[agreement]
        taus = ", ".join(f"{tau:.2f} at γ = {gamma}" for gamma, tau in found["block_efficiency"].items())
        lines.append(f"{kind}: {name} {found[agreement]:.3f}; τ {taus}")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


for _command in (
    distill_lawcat.lawcat,
    distill_masked.a2d,
    distill_masked.dparallel,
    distill_masked.calibrate,
    distill_demos.demos,
):
    distill.add_command(_command)
