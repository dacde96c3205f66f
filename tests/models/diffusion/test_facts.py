"""Facts of a checkpoint: what is accepted, what is recognised, and one line for everything else."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from accel.errors import AccelError, ArtifactError, ModelError, OptionError
from accel.models.diffusion.facts import CONFIG_KEY, KNOWN, DiffusionFacts, facts_for, facts_of, set_facts

# the fields of the published config.json files that tell the checkpoints apart
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
}
DREAM = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "vocab_size": 152064,
    "mask_token_id": 151666,
    "pad_token_id": 151643,
}
ILLADA = {"model_type": "illada", "architectures": ["ILLaDAForCausalLM"], "vocab_size": 155136}


def model(vocab_size: int = 100, **fields: Any) -> Any:
    return SimpleNamespace(config=LlamaConfig(vocab_size=vocab_size, **fields))


def test_published_checkpoints() -> None:
    llada, dream, illada = (facts_for(config, "x") for config in (LLADA, DREAM, ILLADA))
    assert (llada.mask_token, llada.shift, llada.strict, llada.threshold) == (126336, False, False, 0.5)
    assert llada.stop_tokens == (126081, 126348) and llada.pad_token == 126081
    assert (dream.mask_token, dream.shift, dream.strict, dream.threshold) == (151666, True, True, 0.45)
    assert dream.pad_token == 151643 and 151643 in dream.stop_tokens
    assert (illada.mask_token, illada.shift) == (5, False)
    assert {each.facts.rule for each in KNOWN} == {"entropy"}


@pytest.mark.parametrize(
    "config",
    [
        LLADA | {"architectures": ["LLaDAMoEModelLM"]},
        LLADA | {"mask_token_id": 126337},
        LLADA | {"vocab_size": 126000},
        DREAM | {"architectures": ["DreamForCausalLM"], "mask_token_id": 151669},
        ILLADA | {"vocab_size": 126464},
        {},
    ],
)
def test_what_is_nearly_one_of_them_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json$") as caught:
        facts_for(config, "some/folder")
    message = str(caught.value)
    assert message.startswith("some/folder is none of ") and f'"{CONFIG_KEY}"' in message and "\n" not in message


def test_facts_in_a_config_come_before_the_table() -> None:
    facts = facts_for(LLADA | {CONFIG_KEY: {"mask_token": 126336, "threshold": 0.3}}, "x")
    assert facts.threshold == 0.3 and facts.stop_tokens == ()
    with pytest.raises(ModelError, match="mask_token 7, mask_token_id is 126336"):
        facts_for(LLADA | {CONFIG_KEY: {"mask_token": 7}}, "x")


def test_a_round_trip_through_json() -> None:
    facts = DiffusionFacts(mask_token=9, shift=True, rule="confidence", threshold=0.9, stop_tokens=(1, 2), pad_token=1)
    assert DiffusionFacts.parse(json.loads(json.dumps(facts.as_dict()))) == facts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask_token": -1}, "mask_token=-1"),
        ({"mask_token": True}, "mask_token=True"),
        ({"mask_token": "5"}, "mask_token='5'"),
        ({"shift": 1}, "shift=1"),
        ({"strict": "no"}, "strict='no'"),
        ({"block_length": 0}, "block_length=0"),
        ({"block_length": 32.0}, "block_length=32.0"),
        ({"rule": "entropie"}, "unknown rule 'entropie'"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": "0.5"}, "threshold='0.5'"),
        ({"stop_tokens": 2}, "stop_tokens=2"),
        ({"stop_tokens": [1.5]}, "stop_tokens="),
        ({"stop_tokens": "12"}, "stop_tokens='12'"),
        ({"stop_tokens": [5]}, "mask_token=5"),
        ({"pad_token": -2}, "pad_token=-2"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], said: str) -> None:
    given = {"mask_token": 5} | change
    with pytest.raises(OptionError) as caught:
        DiffusionFacts(**given)
    assert str(caught.value).startswith(said)
    with pytest.raises(ArtifactError, match=r"^here: "):
        DiffusionFacts.parse(given, "here")


@pytest.mark.parametrize("raw", [None, [], 5, {}, {"mask_token": 5, "mask": 5}, {"shift": True}])
def test_what_is_no_object_of_facts(raw: object) -> None:
    with pytest.raises(ArtifactError) as caught:
        DiffusionFacts.parse(raw)
    assert "\n" not in str(caught.value)


def test_a_model_carries_its_facts() -> None:
    plain = model()
    assert facts_of(plain) is None
    set_facts(plain, DiffusionFacts(mask_token=99))
    assert facts_of(plain) == DiffusionFacts(mask_token=99)
    assert LlamaConfig(**plain.config.to_dict()).accel_diffusion == plain.config.accel_diffusion


@pytest.mark.parametrize(
    "facts",
    [
        DiffusionFacts(mask_token=100),
        DiffusionFacts(mask_token=1, stop_tokens=(2, 100)),
        DiffusionFacts(mask_token=1, pad_token=100),
    ],
)
def test_facts_of_another_model_are_refused(facts: DiffusionFacts) -> None:
    plain = model()
    with pytest.raises(ModelError, match="the model has 100 tokens"):
        set_facts(plain, facts)
    plain.config.accel_diffusion = facts.as_dict()
    with pytest.raises(AccelError):
        facts_of(plain)
    with pytest.raises(ModelError, match="mask_token_id 4"):
        set_facts(model(mask_token_id=4), DiffusionFacts(mask_token=5))
