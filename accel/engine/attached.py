"""A model whose generate() is ours: what is installed on it, which calls are taken over, and how it is all undone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from accel.artifacts import describe_base
from accel.axes import Decoder
from accel.drafters.base import Drafter
from accel.engine.cartridges import Cartridges, Seat, notes
from accel.engine.drafts import drafter_from
from accel.engine.given import opened, parted
from accel.engine.lawcats import by_length, lawcat_for
from accel.engine.transformers_call import Decoding, PreparedCall
from accel.errors import AccelError, IncompatibleError, OptionError
from accel.methods import MethodInfo, get
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.lawcat.artifact import Lawcat
from accel.models import cpu_linear
from accel.models.diffusion import CONFIG_KEY, Denoiser, facts_of
from accel.models.lean import target_for
from accel.request_log import RequestLog
from accel.types import Stats, options_from

log = logging.getLogger("accel")

# the attributes an attached model carries; detach removes them
STATE, GENERATE = "_accel_attached", "generate"

# options that every method understands
SHARED_OPTIONS = (
    "seed",
    "cpu_linear",
    "tokenizer",
    "draft_tokenizer",
    "log",
    "log_max_bytes",
    "cartridge_max_bytes",
    "lawcat",
)

# arguments whose work our loop does not do
_NOT_OURS = ("inputs_embeds", "negative_prompt_ids", "custom_generate", "synced_gpus")
# settings that make transformers' assisted decoding something other than "a draft model" or "prompt lookup"
_OTHER_ASSISTANTS = ("use_mtp", "assistant_early_exit", "speculation_type", "assistant_ensemble_weight")

# arguments about how transformers would go about it; the output does not depend on them
_WITHOUT_EFFECT = (
    "cache_implementation cache_config compile_config prefill_chunk_size num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind target_lookbehind max_matching_ngram_size"
).split()


class Attached:
    """The state of one attached model, kept on the model itself."""

    def __init__(
        self, model: PreTrainedModel, artifacts: Sequence[object], method: str | None, options: dict[str, Any]
    ) -> None:
        self.model = model
        # None for a model that reads from left to right
        self.facts = facts_of(model)
        self.method = method_for(model, method)
        shared = {name: options.pop(name) for name in SHARED_OPTIONS if name in options}
        self.seed: int | None = _checked_seed(shared.get("seed"))
        self.cpu_linear: str = shared.get("cpu_linear", "auto")
        conversions, others = parted(map(opened, artifacts), Lawcat)
        cartridges, drafts = parted(others, Cartridge)
        lawcat = lawcat_for(conversions, model, shared.get("tokenizer"), shared.get("lawcat"))
        if lawcat is not None:
            self._check_causal("linear attention")
        as_draft = shared.get("lawcat") == "draft"
        self.lawcat = None if as_draft else lawcat
        self._conversion = None if self.lawcat is None else self.lawcat.conversion(model)
        self._by_length = by_length(self._conversion, shared.get("lawcat"))
        if lawcat is not None and as_draft:
            drafts.append(lawcat.student(model))
        # somebody chose to speculate, so that a call which cannot is an error and not a fallback
        self.insists = bool(drafts) or method is not None or bool(options)
        cls = self.method.load_options()
        assert cls is not None, "every decoder has options"
        self.options = options_from(cls, options, f"method {self.method.name!r}")
        self._denoiser: Denoiser | None = None
        if self.facts is not None:
            self.options.plan(self.facts)  # choices that do not go with the model are refused here
            self._read_both_ways()
        self.draft = self._draft(drafts, shared.get("tokenizer"), shared.get("draft_tokenizer"))
        self.cartridges = Cartridges(model, self.draft, shared.get("tokenizer"), shared.get("cartridge_max_bytes"))
        for cartridge in cartridges:
            self._check_causal("a cartridge")
            self._check_softmax("a cartridge")
            self.cartridges.attach(cartridge)
        self.stats = Stats()
        self._said: set[str] = set()
        self._busy = False
        self._speculators: dict[object, Any] = {}
        self._linears: list[cpu_linear.Installed] = []
        if self.method.name == "speculative":
            self._speculator(self.options, self.draft)  # a draft that is asked for but missing is refused here
        self.request_log = _request_log(model, shared)

    def install(self) -> None:
        """Put our generate(), a conversion's layers and, on a CPU, our linear layers on the model (and its draft)."""
        if self._conversion is not None:
            self._conversion.install()
        self._linears = [cpu_linear.install(self.model, self.cpu_linear)]
        if self._by_length is not None:
            self._by_length.rest()
            self._linears.append(cpu_linear.install(self.model, self.cpu_linear))
        reader = getattr(self.draft, "reader", None)
        if reader is not None:
            self._linears.append(cpu_linear.install(reader.linears, self.cpu_linear, may_round=True))
        self.model.__dict__[STATE] = self
        self.model.__dict__[GENERATE] = self.generate

    def remove(self) -> None:
        """Undo ``install``."""
        for installed in self._linears:
            installed.remove()
        self._linears = []
        if self._conversion is not None:
            self._conversion.remove()
        self.model.__dict__.pop(STATE, None)
        self.model.__dict__.pop(GENERATE, None)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate(), with the decoding done by accel wherever the arguments allow it.

        ``cartridges``: what stands in front of the prompts, in order: a list for every row, or one list a row; by
        default the attached ones, and none with an empty list.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        num_rows = len(ids) if isinstance(ids, Tensor) else 1
        asked = kwargs.pop("cartridges", None)
        with self._one_call_at_a_time(), self.cartridges.use(asked, num_rows) as seats:
            _check_prompt(ids)
            with self._layers_for(ids, _Settings(self.model, generation_config, kwargs), kwargs):
                return self._generate(inputs, generation_config, logits_processor, stopping_criteria, seats, **kwargs)

    @contextmanager
    def _layers_for(self, ids: Any, settings: _Settings, kwargs: dict[str, Any]) -> Iterator[None]:
        """The layers that the call's length asks for, where that is what decides."""
        chooser = self._by_length
        # a cache that the caller keeps goes on with the layers that stand in the model between calls
        if chooser is None or not isinstance(ids, Tensor) or kwargs.get("past_key_values") is not None:
            yield
            return
        prompt = ids.shape[-1]
        try:
            chooser.choose(prompt, settings["max_new_tokens"] or max(1, (settings["max_length"] or 20) - prompt))
            yield
        finally:
            chooser.rest()

    @property
    def _runs_linear(self) -> bool:
        """Whether the call under way runs on linear layers."""
        return self.lawcat is not None and (self._by_length is None or self._by_length.linear)

    @contextmanager
    def served(self) -> Iterator[None]:
        """Somebody decodes with the model for many callers at once; generate() is refused meanwhile."""
        if self._by_length is not None:
            raise IncompatibleError(
                "lawcat='auto' or a number puts other layers into the model from call to call, and a server has many "
                "calls under way: pass lawcat='draft', or leave the option out for linear layers always"
            )
        with self._one_call_at_a_time():
            yield

    @contextmanager
    def _one_call_at_a_time(self) -> Iterator[None]:
        """Rows of two calls would mix in the drafter, and one call's stats would be the other's."""
        if self._busy:
            raise AccelError("this model is busy with another generate(): wait for it, or attach a second model")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _generate(
        self,
        inputs: Any,
        generation_config: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        seats: Sequence[Seat],
        **kwargs: Any,
    ) -> Any:
        settings = _Settings(self.model, generation_config, kwargs)
        reason = self._reason_for_transformers(settings, kwargs)
        self.stats = Stats()
        plain_generate = type(self.model).generate
        self.stats.cartridges = list(dict.fromkeys(each.name for seat in seats for each in seat.cartridges))
        self.check_cartridges(self.stats.cartridges)
        for note in notes(seats):
            self._say(note)
        if self.lawcat is not None and self._runs_linear:
            self._say(f"linear attention of {self.lawcat.name}: not the softmax model's own distribution")
        if self._by_length is not None and self._by_length.reason:
            self._say(f"{'linear' if self._runs_linear else 'softmax'} layers: {self._by_length.reason}")
        if reason is not None:
            self._leave_to_transformers(reason)
            return plain_generate(self.model, inputs, generation_config, logits_processor, stopping_criteria, **kwargs)
        kwargs.pop("custom_generate", None)
        if self.facts is not None:
            self._use_facts(settings, kwargs)
        decoding = self._decoding_for_call(settings, kwargs)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if settings["stop_strings"] is not None:
            if kwargs.get("tokenizer") is None:
                raise OptionError("stop_strings without tokenizer=: pass the tokenizer that decodes them")
            criteria.append(StopStringCriteria(kwargs["tokenizer"], settings["stop_strings"]))
        kwargs.pop("tokenizer", None)
        for name in _WITHOUT_EFFECT:
            if kwargs.get(name) is not None:
                self._say(f"{name} has no effect: accel keeps its own rows and chooses its own drafts")
        # what is handled here must not reach transformers, which would refuse it, repeat it or allocate for it
        handled = ("stop_strings", "prompt_lookup_num_tokens", "num_assistant_tokens", "cache_implementation")
        with settings.without(handled, kwargs) as config:
            return plain_generate(
                self.model,
                inputs,
                config,
                logits_processor,
                criteria,
                custom_generate=self._decoding_method(decoding, kwargs.get("streamer"), seats),
                **kwargs,
            )

    def _reason_for_transformers(self, settings: _Settings, kwargs: dict[str, Any]) -> str | None:
        for name in _NOT_OURS:
            value = kwargs.get(name)
            if isinstance(value, Tensor) or value:
                return f"{name} is given"
        if settings["is_assistant"]:
            return "the model assists another one"
        if settings["token_healing"]:
            return "token_healing is given"
        if kwargs.get("past_key_values") is not None:
            return "past_key_values is given: what the caller keeps must be filled"
        if settings["cache_implementation"] == "paged":
            return "cache_implementation='paged'"
        if self.model.config.is_encoder_decoder:
            return "the model is an encoder-decoder"
        mode = settings.mode(kwargs.get("assistant_model"))
        if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return None
        if mode == GenerationMode.ASSISTED_GENERATION:
            for name in _OTHER_ASSISTANTS:
                if settings[name]:
                    return f"{name} is given"
            return None
        name = mode.value.replace("_", " ")
        has_draft = (self.insists and self.method.name == "speculative") or kwargs.get("assistant_model") is not None
        if has_draft and "beam" in name:
            raise IncompatibleError(
                f"num_beams={settings['num_beams']} with a draft: beams cannot be drafted; set num_beams=1, or attach "
                "with method='plain' to let transformers search"
            )
        return f"{name} is transformers' own"

    def _decoding_for_call(self, settings: _Settings, kwargs: dict[str, Any]) -> Decoding:
        """How this call decodes: as attached, or as transformers' own assistant arguments say."""
        assistant = kwargs.pop("assistant_model", None)
        assistant_tokenizer = kwargs.pop("assistant_tokenizer", None)
        lookup, num_tokens = settings["prompt_lookup_num_tokens"], settings["num_assistant_tokens"]
        method, options, draft = self.method, self.options, self.draft
        if assistant is not None or lookup is not None:
            self._check_causal("assistant_model" if assistant is not None else "prompt_lookup_num_tokens")
            method = get("speculative")
            length = lookup if assistant is None else num_tokens
            cls = method.load_options()
            assert cls is not None
            base = self.options if isinstance(self.options, cls) else cls()
            drafter = "lm" if assistant is not None else "ngram"
            # steps are the attached draft's, and this one may have none
            changes = {"drafter": drafter, "draft_length": length or "auto", "draft_steps": 1}
            options = options_from(cls, {**vars(base), **changes}, "method 'speculative'")
            if assistant is not None:
                draft = self._assistant(assistant, kwargs.get("tokenizer"), assistant_tokenizer)

        return Decoding(self.target(), self.decoder_maker(method, options, draft), exact=not self._runs_linear)

    def decoder_maker(
        self, method: MethodInfo, options: Any, draft: Drafter | None
    ) -> Callable[[Any, Stats, bool], Decoder]:
        """What makes the decoder of a call; see ``Decoding``."""

        def make(target: Any, stats: Stats, in_step: bool) -> Decoder:
            if method.decodes == "masked":
                if in_step:
                    raise IncompatibleError(
                        "a custom processor or criterion, or one without an end-of-sequence token, needs the rows of a "
                        "batch at the same length, and masks are filled at each row's own pace: leave it out, or pass "
                        "one row at a time"
                    )
                return method.load()(target, options, stats)
            if method.name == "plain" or in_step:
                if method.name != "plain":
                    self._say("decoded plainly: a custom processor or criterion looks at the whole batch", stats)
                return get("plain").load()(target, get("plain").load_options()(), stats)  # type: ignore[misc]
            return method.load()(target, options, stats, self._speculator(options, draft))

        return make

    def target(self) -> Any:
        """What decoders read the model through: a new one for causal models, whose rows are a call's own."""
        return target_for(self.model) if self.facts is None else self._read_both_ways()

    def _read_both_ways(self) -> Denoiser:
        """The model's denoiser, made once: whether a model can be read without causality is tried on it."""
        assert self.facts is not None
        if self._denoiser is None or self._denoiser.device != self.model.device:
            self._denoiser = Denoiser(self.model, self.facts)
        return self._denoiser

    def _use_facts(self, settings: _Settings, kwargs: dict[str, Any]) -> None:
        """What the call itself leaves open about its end: the facts know better than a causal family's defaults."""
        assert self.facts is not None
        known = {"eos_token_id": list(self.facts.stop_tokens) or None, "pad_token_id": self.facts.pad_token}
        for name, value in known.items():
            if value is not None and settings.of_call(name) is None:
                kwargs[name] = value
        kinds = kwargs.get("token_type_ids")
        # zeros are what a model with such types assumes by itself, for the canvas too
        if isinstance(kinds, Tensor) and hasattr(self.model.config, "type_vocab_size") and not bool(kinds.any()):
            del kwargs["token_type_ids"]

    def check_cartridges(self, names: Sequence[str]) -> None:
        """Refuse cartridges in front of a model that has no place for them."""
        if names:
            self._check_causal("a cartridge")
            self._check_softmax("a cartridge")

    def _check_causal(self, what: str) -> None:
        if self.facts is not None:
            raise IncompatibleError(
                f"{what} with {type(self.model).__name__}, a masked-diffusion model: it serves models that read from "
                "left to right; leave it out"
            )

    def _check_softmax(self, what: str) -> None:
        if self.lawcat is not None:
            raise IncompatibleError(
                f"{what} with the linear attention of {self.lawcat.name}: its keys are for softmax layers; leave "
                "one of the two out"
            )

    def _decoding_method(self, decoding: Decoding, streamer: Any, seats: Sequence[Seat]) -> Any:
        """The callable for transformers' seam."""

        def decode(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **inputs: Any,
        ) -> Any:
            call = PreparedCall(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                inputs,
                streamer,
                self.seed,
                seats,
            )
            obstacle = call.obstacle(causal=self.facts is None)
            if obstacle is None:
                return call.run(decoding, self.stats, self._log_row)
            self._leave_to_transformers(obstacle)
            return type(model)._sample(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
                **inputs,
            )

        return decode

    def _draft(self, artifacts: Sequence[object], tokenizer: Any, draft_tokenizer: Any) -> Drafter | None:
        if not artifacts:
            return None
        self._check_causal("a draft")
        if self.method.name != "speculative":
            raise IncompatibleError(f"method {self.method.name!r} takes no draft: leave it out, or use 'speculative'")
        if len(artifacts) > 1:
            raise IncompatibleError(f"{len(artifacts)} artifacts given: speculative decoding takes one draft")
        return drafter_from(artifacts[0], self.model, tokenizer, draft_tokenizer)

    def _assistant(self, assistant: PreTrainedModel, tokenizer: Any, assistant_tokenizer: Any) -> Drafter:
        key = ("assistant", id(assistant))
        if key not in self._speculators:
            self._speculators[key] = drafter_from(assistant, self.model, tokenizer, assistant_tokenizer)
        drafter: Drafter = self._speculators[key]
        return drafter

    def _speculator(self, options: Any, draft: Drafter | None) -> Any:
        """The speculator for a choice of options and draft, kept so that what it learned carries over."""
        from accel.methods.speculative.build import create_speculator

        # what a step costs differs between softmax and linear layers
        key = (options, id(draft), self._runs_linear)
        if key not in self._speculators:
            self._speculators[key] = create_speculator(options, draft)
        return self._speculators[key]

    def _leave_to_transformers(self, reason: str) -> None:
        if self.facts is not None:
            raise IncompatibleError(
                f"{reason}, which transformers would decode from left to right; {type(self.model).__name__} is a "
                "masked-diffusion model: change the call"
            )
        if self.stats.cartridges:
            raise IncompatibleError(
                f"{reason}, which transformers would decode without the cartridges {', '.join(self.stats.cartridges)}: "
                "change the call, or pass cartridges=[] to leave them out"
            )
        self._say(f"decoded by transformers, not by accel: {reason}")
        if self.request_log is not None:
            self._say("not logged: only rows that accel decodes are")

    def _log_row(self, prompt: Tensor, new: list[int]) -> None:
        """Put a finished row into the log, if there is one; what keeps it out is a note, and the call goes on."""
        if self.request_log is not None and self.stats.cartridges:
            problem: str | None = "not logged: a draft would learn the answer without the cartridge that it came from"
        else:
            problem = None if self.request_log is None else self.request_log.append(prompt.tolist(), new)
        if problem is not None and problem not in self.stats.notes:
            self._say(problem)

    def _say(self, note: str, stats: Stats | None = None) -> None:
        """Put a note on the call's stats, and log it the first time."""
        target = stats or self.stats
        target.notes.append(note)
        if target is self.stats and note.startswith("decoded by transformers"):
            target.method = "transformers"
        if note not in self._said:
            self._said.add(note)
            log.warning("%s", note)


def method_for(model: PreTrainedModel, name: str | None) -> MethodInfo:
    """The decoding method called ``name``, or the model's usual one; refused where the two do not go together."""
    masked = facts_of(model) is not None
    method = get(name or ("dparallel" if masked else "speculative"))
    if method.axis == "router":
        raise OptionError(
            f"method {method.name!r} asks whole models and attaches to none: use accel.{method.name}(student, …)"
        )
    if method.axis != "decoder":
        raise OptionError(
            f"method {method.name!r} is on the {method.axis} axis and decodes nothing: pass its artifact and leave "
            "method out"
        )
    kind = type(model).__name__
    if masked and method.decodes != "masked":
        raise IncompatibleError(
            f"method {method.name!r} reads from left to right, and {kind} is a masked-diffusion model: leave method "
            "out, or use 'dparallel'"
        )
    if method.decodes == "masked" and not masked:
        raise IncompatibleError(
            f"method {method.name!r} decodes masked-diffusion models, and the config of {kind} has no {CONFIG_KEY!r} "
            "(mask token, block length, …) that would make it one: use 'speculative' or 'plain'"
        )
    return method


class _Settings:
    """A call's generation settings as transformers will merge them: argument, then config, then the model's own."""

    def __init__(self, model: PreTrainedModel, config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        self._sources = [kwargs, vars(config) if config is not None else {}, vars(model.generation_config)]
        self._config = config
        self._model = model

    def __getitem__(self, name: str) -> Any:
        return next((source[name] for source in self._sources if source.get(name) is not None), None)

    def of_call(self, name: str) -> Any:
        """What the call itself says, None where it leaves that to the model's config."""
        return next((source[name] for source in self._sources[:2] if source.get(name) is not None), None)

    def mode(self, assistant: object) -> GenerationMode:
        merged = copy.copy(self._model.generation_config)
        for name in vars(merged):
            setattr(merged, name, self[name])
        mode: GenerationMode = merged.get_generation_mode(assistant)
        return mode

    @contextmanager
    def without(self, names: Sequence[str], kwargs: dict[str, Any]) -> Iterator[GenerationConfig | None]:
        """The call's config with some settings taken out everywhere for the length of the call.

        The model's own config must be touched for it, because None in a call's config means "the model's default".
        """
        config = self._config
        if config is not None and any(getattr(config, name, None) is not None for name in names):
            config = copy.deepcopy(config)
            for name in names:
                setattr(config, name, None)
        for name in names:
            kwargs.pop(name, None)
        own = self._model.generation_config
        before = {name: vars(own)[name] for name in names if vars(own).get(name) is not None}
        with ExitStack() as restore:
            for name, value in before.items():
                setattr(own, name, None)
                restore.callback(setattr, own, name, value)
            yield config


def _check_prompt(ids: Any) -> None:
    if isinstance(ids, Tensor) and ids.ndim == 2 and 0 in ids.shape:
        what = "batch" if ids.shape[0] == 0 else "prompt"
        raise OptionError(f"empty {what}: input_ids has shape {list(ids.shape)}; give at least one row of one token")


def _checked_seed(seed: object) -> int | None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise OptionError(f"seed={seed!r}: must be a whole number ≥ 0, or None to follow torch.manual_seed")
    return seed


def _request_log(model: PreTrainedModel, shared: dict[str, Any]) -> RequestLog | None:
    path, limit = shared.get("log"), shared.get("log_max_bytes")
    if path is None:
        if limit is not None:
            raise OptionError(f"log_max_bytes={limit!r} without log: name the file that it bounds")
        return None
    base = describe_base(model.config, shared.get("tokenizer"))
    return RequestLog(path, base) if limit is None else RequestLog(path, base, limit)
