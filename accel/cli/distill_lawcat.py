"""``accel distill lawcat``: options to a recipe, progress, and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from accel.cli.common import DEFAULT_MODEL, parse_layers, table
from accel.cli.recipes import Run, folder_options, prompts_option, run_options
from accel.errors import OptionError


def parse_rank(text: str) -> int | None:
    """``16`` → 16, ``full`` → None, ``0`` → 0."""
    if text == "full":
        return None
    if not text.isdecimal():
        raise OptionError(f"--gate-rank {text!r}: give a whole number, full for one matrix, or 0 for no gate")
    return int(text)


@click.command("lawcat")
@click.argument("model", default=DEFAULT_MODEL)
@prompts_option(", and an answer behind it where there is one: a document a line", required=False)
@click.option(
    "--corpus",
    "corpus_files",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Plain text (UTF-8). Repeatable, also beside --prompts.",
)
@folder_options(work="Checkpoints")
@click.option("--layers", metavar="A,B,…", help="Layers of MODEL to convert. [default: all]")
@click.option(
    "--keep-softmax",
    type=int,
    default=0,
    show_default=True,
    help="Of these, as many stay softmax: those that raise the held-out loss most when converted alone.",
)
@click.option("--gate-rank", default="16", show_default=True, help="Of the forget gate; full, or 0 for no gate.")
@click.option("--no-conv", is_flag=True, help="Features of each token alone.")
@click.option("--share-conv", is_flag=True, help="Queries and keys have the same conv.")
@click.option("--tie-maps", is_flag=True, help="Queries and keys have the same feature map.")
@click.option("--silu", is_flag=True, help="SiLU behind the conv.")
@click.option("--no-denominator", is_flag=True, help="Leave out the normalisation.")
@click.option(
    "--window", type=int, default=0, show_default=True, help="Tokens of softmax under the same denominator; 0 for none."
)
@click.option("--length", type=int, default=1024, show_default=True, help="Tokens of a training row.")
@click.option("--batch-tokens", type=int, default=8192, show_default=True, help="Tokens of a batch.")
@click.option("--transfer-steps", type=int, default=1000, show_default=True, help="Of stage 1: each layer on its own.")
@click.option("--transfer-rate", type=float, default=1e-2, show_default=True, help="Its learning rate, at its peak.")
@click.option(
    "--tune-steps", type=int, default=1000, show_default=True, help="Of stage 2: the whole model; 0 for none."
)
@click.option("--tune-rate", type=float, default=1e-4, show_default=True, help="Its learning rate, at its peak.")
@click.option(
    "--lora-rank", type=int, default=8, show_default=True, help="Of stage 2's additions to q, k, v and o; 0 for none."
)
@click.option("--lora-alpha", type=float, default=16.0, show_default=True, help="Scale of the additions.")
@click.option("--tune-own", is_flag=True, help="Stage 2 trains convs, feature maps and gates too.")
@click.option("--next-token", type=float, default=1.0, show_default=True, help="Weight of stage 2's cross entropy.")
@click.option(
    "--kl", type=float, default=1.0, show_default=True, help="Weight of its divergence from MODEL; 0 is as published."
)
@click.option("--checkpoint-every", type=int, default=50, show_default=True, help="Steps that a kill loses at most.")
@click.option("--held-out", type=float, default=0.02, show_default=True, help="Share of the documents to measure with.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of first weights, rows and batches.")
@run_options(bounds="checkpoints and artifact", plan="rows, layers and disk use")
def lawcat(
    prompt_files: tuple[Path, ...],
    corpus_files: tuple[Path, ...],
    layers: str | None,
    gate_rank: str,
    no_conv: bool,
    silu: bool,
    no_denominator: bool,
    **given: Any,
) -> None:
    """Make linear attention for MODEL: a delta of a few MB that `accel generate -a` puts into it.

    Each converted layer first learns what the softmax layer in its place says; then additions of low rank learn with
    the whole model. A run that was killed goes on when it is called again.
    """
    run, choices = Run.of(given)
    from accel.methods.lawcat.distill.recipe import Recipe, distill, prepare
    from accel.methods.lawcat.distill.texts import documents

    recipe = Recipe(
        layers=None if layers is None else parse_layers(layers),
        gate_rank=parse_rank(gate_rank),
        conv_width=0 if no_conv else 4,
        activation="silu" if silu else None,
        normalised=not no_denominator,
        **run.limits,
        **choices,
    )
    with run.loaded("texts") as (progress, teacher, tokenizer):
        texts = documents(prompt_files, corpus_files, tokenizer, recipe.length)
        prepared = prepare(teacher, texts, recipe)
        if run.only_plan:
            progress("")
            run.tell(prepared.as_dict(), _plan_text(prepared.as_dict()))
            return
        artifact = distill(
            teacher,
            tokenizer,
            texts,
            recipe,
            run.work_folder,
            run.target,
            progress,
            **run.signature,
            prepared=prepared,
        )
    run.report(artifact, prepared, f"{artifact.path}\n{_report(artifact.manifest.measured)}")


def _plan_text(plan: dict[str, Any]) -> str:
    disk, spec = plan["disk"], plan["spec"]
    return "\n".join(
        [
            f"texts: {plan['documents']} documents, {plan['rows']} rows of {plan['tokens'] // plan['rows']} tokens, "
            f"{plan['held_out_tokens']} tokens held out",
            f"layers to convert: {', '.join(map(str, spec['layers']))}",
            f"parameters: {plan['own_parameters'] / 1e6:.2f}M of the layers, {plan['lora_parameters'] / 1e6:.2f}M LoRA",
            f"disk: at most {disk['total'] / 1e6:.1f} MB (stage 1 {disk['transfer'] / 1e6:.1f}, stage 2 "
            f"{disk['tuning'] / 1e6:.1f}, artifact {disk['artifact'] / 1e6:.1f})",
        ]
    )


def _report(measured: dict[str, Any]) -> str:
    names = {"teacher": "softmax", "transferred": "after stage 1", "student": "as saved"}
    rows = [
        [label, f"{measured[who]['cross_entropy']:.4f}", f"{measured[who]['perplexity']:.3f}"]
        for who, label in names.items()
        if who in measured
    ]
    rises = measured.get("sensitivity", {})
    kept = measured.get("kept_softmax", [])
    layers = [
        [
            layer,
            f"{found['before']:.3f} → {found['after']:.3f}",
            *([f"{rises[layer]:+.4f}", "softmax" if int(layer) in kept else "linear"] if rises else []),
        ]
        for layer, found in sorted(measured["transfer"].items(), key=lambda item: int(item[0]))
    ]
    header = ["layer", "error of stage 1", *(["rise alone", "becomes"] if rises else [])]
    return "\n".join(
        [
            f"{measured['held_out_tokens']} held-out tokens, rows of {measured['training_length']}",
            table(["", "cross entropy", "perplexity"], rows),
            table(header, layers),
        ]
    )
