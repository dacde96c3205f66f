"""From what a user hands over as a draft (a path, an artifact, a live model, a drafter) to a drafter."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accel.artifacts import Artifact, check_base
from accel.drafters.base import Drafter
from accel.drafters.eagle3 import Eagle3Drafter, is_head, load_head
from accel.drafters.masked import MaskedDrafter
from accel.drafters.small_lm import SmallLMDrafter
from accel.drafters.translated import TranslatedDrafter
from accel.engine.given import opened
from accel.errors import ArtifactError, IncompatibleError
from accel.methods.dparallel import artifact as masked_artifacts
from accel.methods.speculative import artifact as draft_artifacts
from accel.models.diffusion import Denoiser, facts_of
from accel.models.loading import load_model


def drafter_from(
    given: object,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """The drafter for ``model`` that ``given`` stands for.

    With ``tokenizer`` and ``draft_tokenizer`` a live draft model is translated between the two vocabularies; of a
    masked-diffusion model, which is not translated, the two must agree.
    """
    vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
    if isinstance(given, PreTrainedModel):
        if given is model:
            raise IncompatibleError("the draft is the target itself: pass a smaller model")
        if facts_of(given) is not None:
            return _masked(given, vocab_size, tokenizer, draft_tokenizer)
        if draft_tokenizer is not None:
            if tokenizer is None:
                raise IncompatibleError("draft_tokenizer= without tokenizer=: pass the target's tokenizer too")
            return TranslatedDrafter(given, draft_tokenizer, tokenizer, vocab_size)
        return SmallLMDrafter(given, vocab_size)
    given = opened(given)
    if isinstance(given, str | Path):
        folder = Path(given)
        if is_head(folder):
            if draft_tokenizer is not None:
                raise IncompatibleError(f"draft_tokenizer= with the draft head {folder}: it needs none; leave it out")
            return Eagle3Drafter(load_head(folder, model), model)
        draft, own = load_model(folder, device=model.device, dtype=model.dtype)
        if facts_of(draft) is not None:
            draft_tokenizer = draft_tokenizer or own
        return drafter_from(draft, model, tokenizer, draft_tokenizer)
    if isinstance(given, Artifact) and given.kind == masked_artifacts.KIND:
        return _from_masked_artifact(given, model, vocab_size, tokenizer)
    if isinstance(given, Artifact):
        return _from_artifact(given, model, vocab_size)
    if isinstance(given, Drafter):
        return given
    raise ArtifactError(
        f"{type(given).__name__} is no artifact: give a path or id, an accel.Artifact, a transformers model or an "
        "accel.Drafter"
    )


def _from_artifact(artifact: Artifact, model: PreTrainedModel, vocab_size: int) -> Drafter:
    if artifact.manifest.kind == "demos":
        raise ArtifactError(
            f"{artifact.path.name} holds demonstrations (demos), which nothing decodes with: pass it to "
            "accel.cascade(student, …), or to --method cascade"
        )
    if artifact.manifest.kind != draft_artifacts.KIND:
        raise ArtifactError(
            f"{artifact.path.name} is a {artifact.manifest.kind} artifact: speculative decoding takes kind "
            f"{draft_artifacts.KIND!r}, or {masked_artifacts.KIND!r} of a masked-diffusion model"
        )
    check_base(artifact, model.config)
    draft, vocabulary = draft_artifacts.load(artifact, vocab_size, model.dtype)
    return SmallLMDrafter(draft.to(model.device), vocab_size, vocabulary)


def _from_masked_artifact(
    artifact: Artifact, model: PreTrainedModel, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    """The manifest names the model that it was made from, which need not be the one that it drafts for."""
    masked_artifacts.facts_in(artifact)
    for name in artifact.manifest.files:
        artifact.file(name)
    draft, own = load_model(artifact.path, device=model.device, dtype=model.dtype)
    return _masked(draft, vocab_size, tokenizer, own)


def _masked(
    draft: PreTrainedModel,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
    own: PreTrainedTokenizerBase | None,
) -> Drafter:
    """``own``: the draft's tokenizer; where one of the two is not known, the sizes alone are compared."""
    facts = facts_of(draft)
    assert facts is not None, "a masked-diffusion model carries its facts"
    if tokenizer is not None and own is not None:
        ours, theirs = ({id: text for text, id in each.get_vocab().items()} for each in (tokenizer, own))
        # either may name tokens that the other leaves unnamed, as checkpoints of one family do
        differ = sorted(id for id in ours.keys() & theirs.keys() - {facts.mask_token} if ours[id] != theirs[id])
        if differ:
            raise IncompatibleError(
                f"the masked-diffusion draft has another tokenizer than the model (token {differ[0]} is "
                f"{theirs[differ[0]]!r} there and {ours[differ[0]]!r} here): its drafts are not translated; use one "
                "with the model's tokenizer, or a small causal model"
            )
    return MaskedDrafter(Denoiser(draft, facts), vocab_size)
