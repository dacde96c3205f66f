"""The public surface: attach, detach, generate, load, stats. Everything a user calls from Python starts here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from accel.artifacts import Artifact
from accel.engine.attached import SHARED_OPTIONS, STATE, Attached, method_for
from accel.engine.given import opened, parted
from accel.errors import AccelError, ModelError, OptionError
from accel.methods.cartridge import template
from accel.methods.cartridge.store import CartridgeStore
from accel.models.loading import load_model
from accel.types import Stats, options_from

if TYPE_CHECKING:
    from accel.methods.cascade.agreement import Key, Same
    from accel.methods.cascade.router import Cascade

# stats of accel.generate(), which leaves no trace on the model
_one_off_stats: WeakKeyDictionary[PreTrainedModel, Stats] = WeakKeyDictionary()

Messages = Sequence[dict[str, str]]


def attach(model: PreTrainedModel, *artifacts: object, method: str | None = None, **options: Any) -> PreTrainedModel:
    """Accelerate ``model.generate()`` from now on; returns the same model.

    ``artifacts``: a path or id of an artifact, an ``Artifact``, a transformers model used as a draft (a causal one,
    or a masked-diffusion one with this model's tokenizer), or a ``Drafter``; and any number of cartridges (paths,
    ids, ``Cartridge`` objects), which stand in front of every prompt in the order given unless a call says
    ``generate(…, cartridges=[…])``; or one LAWCAT conversion, which replaces softmax layers by linear ones until
    ``detach`` (``lawcat="draft"``: in a draft that shares the model's weights, and the model stays as it is;
    ``"auto"``: in calls that are answered sooner that way, as timed here; a number: for prompts of so many tokens
    or more). ``method``: "speculative" (the default; lossless unless lenience is asked for) or "plain"; "dparallel"
    for masked-diffusion models, which have no other and take no artifacts. ``options``: the method's own (listed by
    ``accel methods``), and for every method ``seed`` and ``cpu_linear`` ("auto", "compiled", "packed",
    "transposed", "linear": how fp32 linear layers run on a CPU). ``log``: a file to which each finished row's prompt
    and new tokens are appended, for ``accel distill draft``; ``log_max_bytes`` (100 MB) bounds it and the older
    ``NAME.1.SUFFIX`` together, and ``tokenizer`` makes it name the tokenizer. ``cartridge_max_bytes`` bounds the
    cartridges in memory: those that no call reads are dropped and read again when needed.
    """
    before = model.__dict__.get(STATE)
    # what is new must see the model itself, and not what the one before put into it
    detach(model)
    try:
        attached = Attached(model, artifacts, method, options)
    except BaseException:
        if before is not None:
            before.install()
        raise
    attached.install()
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model what it was before ``attach``, bit for bit; a model that is not attached is left alone."""
    attached = model.__dict__.get(STATE)
    if attached is not None:
        attached.remove()
    return model


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    artifacts: Sequence[object] = (),
    method: str | None = None,
    **generate_kwargs: Any,
) -> Any:
    """``model.generate(inputs, **generate_kwargs)``, accelerated for this one call; transformers' return types.

    The method's options (``drafter=``, ``draft_length=``, …) may stand among the keyword arguments.
    """
    cls = method_for(model, method).load_options()
    names = {field.name for field in dataclasses.fields(cls)} if cls else set()
    # transformers' own generate() takes a tokenizer too
    names |= set(SHARED_OPTIONS) - {"tokenizer"}
    options = {name: generate_kwargs.pop(name) for name in sorted(names & set(generate_kwargs))}
    if {"draft_tokenizer", "log"} & set(options) and "tokenizer" in generate_kwargs:
        options["tokenizer"] = generate_kwargs["tokenizer"]
    before = model.__dict__.get(STATE)
    attach(model, *artifacts, method=method, **options)
    attached: Attached = model.__dict__[STATE]
    try:
        return model.generate(inputs, **generate_kwargs)
    finally:
        _one_off_stats[model] = attached.stats
        detach(model)
        if before is not None:
            before.install()


def stats(model: PreTrainedModel) -> Stats:
    """Figures of the model's last accelerated call; the same object is ``.accel`` on transformers' output objects."""
    attached = model.__dict__.get(STATE)
    found: Stats | None = attached.stats if attached is not None else _one_off_stats.get(model)
    if found is None:
        raise AccelError("no accelerated call yet: attach the model and call generate(), or use accel.generate()")
    return found


def cartridges(model: PreTrainedModel) -> CartridgeStore:
    """The cartridges of an attached model: ``add``, ``remove``, ``names``, ``nbytes``, ``report``, at any time.

    Calls name what they read: ``model.generate(…, cartridges=[name, …])``.
    """
    attached = model.__dict__.get(STATE)
    if attached is None:
        raise AccelError("the model is not attached: accel.attach(model) first")
    store: CartridgeStore = attached.cartridges.store
    return store


def load(
    name_or_path: str,
    artifacts: Sequence[object] = (),
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> Model:
    """Load a model by alias, folder or hub id, and attach it; ``options`` are those of ``attach``."""
    model, tokenizer = load_model(name_or_path, device=device, dtype=dtype)
    return Model(attach(model, *artifacts, **{"tokenizer": tokenizer} | options), tokenizer)


def cascade(
    student: object,
    artifacts: Sequence[object] = (),
    *,
    teacher: object = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    key: Key | None = None,
    same: Same | None = None,
    **options: Any,
) -> Cascade:
    """A cheap student that is shown a teacher's demonstrations and asked several times; the teacher where it wavers.

    ``student`` and ``teacher``: a name as for ``load``, ``MODEL@URL`` of an OpenAI-compatible endpoint, an
    ``accel.Model`` (with its draft and cartridges), or an ``Answerer``. Without a teacher samples that differ give the
    student's best answer. ``artifacts``: demonstrations (kind "demos"), and whatever else the student is to be
    loaded with. ``options``: those of the method (``accel methods``), the others are for loading the student. ``key``
    or ``same``: a comparison of one's own. ``.answer(messages)`` says who answered, why, and what it cost.
    In-context distillation with self-consistency cascades, arXiv 2512.02543.
    """
    # a client for HTTP and a database: not for those who load a model
    from accel.methods.cascade import build
    from accel.methods.cascade.demos import Demos

    found, others = parted(map(opened, artifacts), Demos)
    names = {field.name for field in dataclasses.fields(build.CascadeSetup)}
    own = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    setup: build.CascadeSetup = options_from(build.CascadeSetup, {"teacher": teacher, **own}, "method 'cascade'")
    if (others or rest) and (not isinstance(student, str) or "@http" in student):
        given = ", ".join([*map(str, others), *rest])
        raise OptionError(f"{given}: for a student that is loaded here by its name, and this one is there already")

    def load_student(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        made = load(name, others, device=device, dtype=dtype, **rest)
        return made.model, made.tokenizer

    def load_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        made = load(name, device=device, dtype=dtype)
        return made.model, made.tokenizer

    asked = build.answerer(student, setup, load_student)
    above = None if setup.teacher is None else build.answerer(setup.teacher, setup, load_teacher)
    demos = [Demos.load(each) if isinstance(each, Artifact) else each for each in found]
    return build.cascade(asked, above, setup, demos, key=key, same=same)


class _Abandoned(Exception):
    """Nobody reads the stream any more."""


class _Pieces(TextIteratorStreamer):
    """Hands text from the thread that decodes to the one that reads."""

    abandoned = False

    def put(self, value: Tensor) -> None:
        if self.abandoned:
            raise _Abandoned
        super().put(value)


@dataclass(frozen=True)
class Model:
    """An accelerated transformers model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def stats(self) -> Stats:
        return stats(self.model)

    def generate(self, prompt: str, *, max_new_tokens: int = 256, **generate_kwargs: Any) -> str:
        """Continue a text; returns the new text only."""
        return self._text(self._encode(prompt, generate_kwargs), max_new_tokens, generate_kwargs)

    def chat(self, messages: str | Messages, *, max_new_tokens: int = 256, **generate_kwargs: Any) -> str:
        """Answer a message, or a conversation of {"role", "content"} messages, through the model's chat template."""
        return self._text(self._encode_chat(messages, generate_kwargs), max_new_tokens, generate_kwargs)

    def stream(self, messages: str | Messages, *, max_new_tokens: int = 256, **generate_kwargs: Any) -> Iterator[str]:
        """Like ``chat``, in pieces as soon as they are final; plain continuation for models without a template."""
        tokenizer = self._tokenizer()
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if not has_template and not isinstance(messages, str):
            raise OptionError("this model has no chat template: stream() takes one string of text for it")
        if has_template:
            inputs = self._encode_chat(messages, generate_kwargs)
        else:
            inputs = self._encode(str(messages), generate_kwargs)
        streamer = _Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def run() -> None:
            try:
                self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **generate_kwargs)
            except _Abandoned:
                pass
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = Thread(target=run, daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            # a reader that stops early stops the decoding too: the model must be free for its next call
            streamer.abandoned = True
            worker.join()
        if failure:
            raise failure[0]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ModelError("this model was loaded without a tokenizer: call .model.generate() with token ids")
        return self.tokenizer

    def _encode(self, prompt: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        tokenizer = self._tokenizer()
        if self._template(settings) is not None:
            return self._batch_of_one(template.text_ids(tokenizer, prompt))
        return self._batch_of_one(tokenizer(prompt)["input_ids"])

    def _encode_chat(self, messages: str | Messages, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        tokenizer, kind = self._tokenizer(), self._template(settings)
        if kind is not None:
            return self._batch_of_one(template.query_ids(tokenizer, conversation, kind))
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
        return self._batch_of_one(encoded["input_ids"])

    def _template(self, settings: Mapping[str, Any]) -> str | None:
        """How the cartridges of a call with these settings were made to be followed; None where it has none."""
        attached: Attached | None = self.model.__dict__.get(STATE)
        return None if attached is None else attached.cartridges.template(settings.get("cartridges"))

    def _batch_of_one(self, ids: Sequence[int]) -> dict[str, Tensor]:
        input_ids = torch.tensor([list(ids)], device=self.model.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _text(self, inputs: dict[str, Tensor], max_new_tokens: int, generate_kwargs: dict[str, Any]) -> str:
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **generate_kwargs)
        text: str = self._tokenizer().decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text
