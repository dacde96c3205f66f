"""LoRA adapters merged under the names of their own base model; what cannot be merged whole is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import (
    DREAM,
    DREAM_FACTS,
    LLADA,
    LLADA_FACTS,
    dream_tensors,
    llada_logits,
    llada_tensors,
    rms_ratio,
    write_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor

from accel.errors import AccelError
from accel.models.diffusion import CONFIG_KEY, Denoiser, facts_of
from accel.models.loading import load_model

RANK, ALPHA = 3, 6
ALL = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "llada", LLADA | {CONFIG_KEY: LLADA_FACTS}, llada_tensors())


def halves(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, shape[1], generator=g) * 0.3, torch.randn(shape[0], RANK, generator=g) * 0.3


def write_adapter(folder: Path, base: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    raw = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": ["q_proj", "o_proj"],
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(raw | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def adapter_for(base: dict[str, Tensor], names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter of some of the base's tensors as PEFT names it, and the base with α/r · B A added by hand."""
    tensors, merged = {}, dict(base)
    for seed, name in enumerate(names):
        a, b = halves(tuple(base[name].shape), seed)
        module = name.removesuffix(".weight")
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        merged[name] = base[name] + ALPHA / RANK * b @ a
    return tensors, merged


def test_every_linear_layer_of_llada(tmp_path: Path, llada: Path) -> None:
    base = llada_tensors()
    names = [f"model.transformer.blocks.{layer}.{name}.weight" for layer in (0, 1) for name in ALL]
    tensors, merged = adapter_for(base, [*names, "model.transformer.ff_out.weight"])
    model, _ = load_model(write_adapter(tmp_path / "adapter", llada, tensors), device="cpu")
    facts = facts_of(model)
    assert facts is not None
    row = torch.arange(3, 12)
    (logits,) = Denoiser(model, facts).logits([row], [torch.arange(9)])
    assert rms_ratio(logits, llada_logits(merged, row)) <= 1e-5
    assert rms_ratio(logits, llada_logits(base, row)) > 0.1


@pytest.mark.parametrize("name", [*(f"blocks.1.{name}" for name in ALL), "ff_out"])
def test_each_name_is_its_own_layer(tmp_path: Path, llada: Path, name: str) -> None:
    # a block's ff_out is its way out of the MLP, the other one is the head
    base, row = llada_tensors(), torch.arange(3, 9)
    tensors, merged = adapter_for(base, [f"model.transformer.{name}.weight"])
    model, _ = load_model(write_adapter(tmp_path / "adapter", llada, tensors), device="cpu")
    (logits,) = Denoiser(model, facts_of(model)).logits([row], [torch.arange(6)])
    assert rms_ratio(logits, llada_logits(merged, row)) <= 1e-5


def test_dream_has_the_names_of_a_qwen2(tmp_path: Path) -> None:
    base = dream_tensors()
    folder = write_checkpoint(tmp_path / "dream", DREAM | {CONFIG_KEY: DREAM_FACTS}, base)
    names = ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    tensors, merged = adapter_for(base, names)
    model, _ = load_model(write_adapter(tmp_path / "adapter", folder, tensors), device="cpu")
    for name in (*names, "model.layers.0.mlp.down_proj.weight"):
        assert torch.allclose(model.state_dict()[name], merged[name], atol=1e-6)


def test_scales(tmp_path: Path, llada: Path) -> None:
    base = llada_tensors()
    name = "model.transformer.blocks.0.q_proj"
    tensors, _ = adapter_for(base, [f"{name}.weight"])
    b, a = tensors[f"base_model.model.{name}.lora_B.weight"], tensors[f"base_model.model.{name}.lora_A.weight"]
    for index, (config, scale) in enumerate(
        [
            ({"use_rslora": True}, ALPHA / RANK**0.5),
            ({"alpha_pattern": {"k_proj": 99, "blocks.0.q_proj": 12}}, 12 / RANK),
            ({"lora_alpha": 1.5}, 1.5 / RANK),
        ]
    ):
        model, _ = load_model(write_adapter(tmp_path / f"{index}", llada, tensors, **config), device="cpu")
        expected = base[f"{name}.weight"] + scale * b @ a
        assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight, expected, atol=1e-6)


def test_a_half_precision_model_is_merged_in_fp32(tmp_path: Path, llada: Path) -> None:
    base = llada_tensors()
    name = "model.transformer.blocks.0.up_proj.weight"
    tensors, merged = adapter_for(base | {name: base[name].bfloat16().float()}, [name])
    folder = write_adapter(tmp_path / "adapter", llada, tensors)
    model, _ = load_model(folder, device="cpu", dtype="bfloat16")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, merged[name].bfloat16())


def refusal(folder: Path) -> str:
    with pytest.raises(AccelError) as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "module",
    [
        "model.transformer.blocks.0.att_proj",
        "model.transformer.blocks.0.o_proj",
        "model.transformer.blocks.0.attn_norm",
        "model.transformer.blocks.2.q_proj",
        "model.transformer.wte",
        "model.layers.0.self_attn.qkv_proj",
    ],
)
def test_a_target_that_the_model_has_not_is_refused(tmp_path: Path, llada: Path, module: str) -> None:
    a, b = halves((32, 32), 0)
    tensors = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    good, _ = adapter_for(llada_tensors(), ["model.transformer.blocks.0.q_proj.weight"])
    assert module in refusal(write_adapter(tmp_path / "adapter", llada, good | tensors))


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LOHA"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["ff_out"]},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"lora_alpha": "16"},
        {"alpha_pattern": {"(": 3}},
        {"base_model_name_or_path": None},
    ],
)
def test_what_is_more_than_plain_lora_is_refused(tmp_path: Path, llada: Path, config: dict[str, Any]) -> None:
    good, _ = adapter_for(llada_tensors(), ["model.transformer.blocks.0.q_proj.weight"])
    assert next(iter(config)) in refusal(write_adapter(tmp_path / "adapter", llada, good, **config))


def test_tensors_that_do_not_fit_or_do_not_pair_are_refused(tmp_path: Path, llada: Path) -> None:
    name = "base_model.model.model.transformer.blocks.0.q_proj"
    a, b = halves((32, 32), 0)
    assert "another model" in refusal(
        write_adapter(tmp_path / "a", llada, {f"{name}.lora_A.weight": a[:, :16].clone(), f"{name}.lora_B.weight": b})
    )
    assert "alone" in refusal(write_adapter(tmp_path / "b", llada, {f"{name}.lora_A.weight": a}))
    pair = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    extra = pair | {f"{name}.lora_magnitude_vector": torch.ones(32)}
    assert "nothing is left out" in refusal(write_adapter(tmp_path / "c", llada, extra))
    assert "no tensors" in refusal(write_adapter(tmp_path / "d", llada, {}))
    twice = pair | {
        k.replace("model.transformer.blocks.0.", "model.layers.0.self_attn."): v.clone() for k, v in pair.items()
    }
    assert "another name" in refusal(write_adapter(tmp_path / "e", llada, twice))
    missing = write_adapter(tmp_path / "f", llada, pair)
    (missing / "adapter_model.safetensors").rename(missing / "adapter_model.bin")
    assert "safetensors only" in refusal(missing)
    nested = write_adapter(tmp_path / "g", missing, pair)
    assert "one by one" in refusal(nested)


def test_a_tied_head_cannot_be_adapted(tmp_path: Path) -> None:
    base = llada_tensors()
    del base["model.transformer.ff_out.weight"]
    folder = write_checkpoint(tmp_path / "tied", LLADA | {"weight_tying": True, CONFIG_KEY: LLADA_FACTS}, base)
    a, b = halves((71, 32), 0)
    tensors = {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
    assert "tied" in refusal(write_adapter(tmp_path / "adapter", folder, tensors))
