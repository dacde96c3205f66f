"""A small artifact and the model it was made for, made anew for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from accel.artifacts import Artifact, Manifest, describe_base, save


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )


@pytest.fixture
def manifest(config: LlamaConfig) -> Manifest:
    return Manifest(
        kind="draft",
        base=describe_base(config, name="tiny", revision="r1"),
        parameters={"d2t": "maps.safetensors"},
        made={"command": "accel distill draft", "commit": "abc", "data_digest": None, "seed": 7, "losses": [2.0, 1]},
        measured={"acceptance": 0.5},
    )


@pytest.fixture
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        # a strided view and two views of one storage: what the file format alone would refuse
        "model.safetensors": {"weight": weight, "transposed": weight.T},
        "maps.safetensors": {"d2t": torch.arange(5), "half": torch.ones(2, dtype=torch.bfloat16)},
    }


@pytest.fixture
def artifact(tmp_path: Path, manifest: Manifest, tensors: dict[str, dict[str, torch.Tensor]]) -> Artifact:
    return save(tmp_path / "saved", manifest, tensors, {"config.json": "{}\n"})
