"""Tiny masked-diffusion checkpoints under their published names, and their logits written out as equations.

The forward passes below are the papers' and the published code's computation in plain PyTorch, one row at a time, with
no class of transformers: what ``accel.models.diffusion`` has to agree with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, WIDTH, INNER, HEADS, LAYERS, MASK, STOP = 71, 32, 48, 4, 2, 70, 2

LLADA: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM", "AutoConfig": "configuration_llada.LLaDAConfig"},
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "weight_tying": False,
    "d_model": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "mlp_hidden_size": INNER,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "max_sequence_length": 128,
    "mask_token_id": MASK,
    "eos_token_id": STOP,
    "pad_token_id": STOP,
}
DREAM: dict[str, Any] = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {"AutoModel": "modeling_dream.DreamModel", "AutoConfig": "configuration_dream.DreamConfig"},
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
    "mask_token_id": MASK,
    "bos_token_id": STOP,
    "eos_token_id": STOP,
    "pad_token_id": STOP,
}
# what a tiny checkpoint says of itself, being none that anybody knows
LLADA_FACTS = {"mask_token": MASK, "stop_tokens": [STOP], "pad_token": STOP, "block_length": 8}
DREAM_FACTS = LLADA_FACTS | {"shift": True, "strict": True, "threshold": 0.45}


def llada_tensors(*, seed: int = 0, n_kv_heads: int = HEADS) -> dict[str, Tensor]:
    """Random tensors under LLaDA's names; norms are away from 1, so that a missing one shows."""
    g = torch.Generator().manual_seed(seed)
    kv = WIDTH // HEADS * n_kv_heads
    shapes = {"q_proj": (WIDTH, WIDTH), "k_proj": (kv, WIDTH), "v_proj": (kv, WIDTH), "attn_out": (WIDTH, WIDTH)}
    shapes |= {"ff_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "ff_out": (WIDTH, INNER)}
    tensors = {f"model.transformer.{name}.weight": _random(g, VOCAB, WIDTH) for name in ("wte", "ff_out")}
    tensors["model.transformer.ln_f.weight"] = _norm(g)
    for layer in range(LAYERS):
        at = f"model.transformer.blocks.{layer}"
        tensors |= {f"{at}.{name}.weight": _random(g, *shape) for name, shape in shapes.items()}
        tensors |= {f"{at}.{name}.weight": _norm(g) for name in ("attn_norm", "ff_norm")}
    return tensors


def dream_tensors(*, seed: int = 1) -> dict[str, Tensor]:
    """Random tensors under Dream's names, which are Qwen2's: queries, keys and values have biases."""
    g = torch.Generator().manual_seed(seed)
    kv = WIDTH // HEADS * DREAM["num_key_value_heads"]
    tensors = {name: _random(g, VOCAB, WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = _norm(g)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, size in (("q_proj", WIDTH), ("k_proj", kv), ("v_proj", kv)):
            tensors[f"{at}.self_attn.{name}.weight"] = _random(g, size, WIDTH)
            tensors[f"{at}.self_attn.{name}.bias"] = _random(g, size)
        tensors[f"{at}.self_attn.o_proj.weight"] = _random(g, WIDTH, WIDTH)
        tensors[f"{at}.mlp.gate_proj.weight"] = _random(g, INNER, WIDTH)
        tensors[f"{at}.mlp.up_proj.weight"] = _random(g, INNER, WIDTH)
        tensors[f"{at}.mlp.down_proj.weight"] = _random(g, WIDTH, INNER)
        tensors[f"{at}.input_layernorm.weight"] = _norm(g)
        tensors[f"{at}.post_attention_layernorm.weight"] = _norm(g)
    return tensors


def llada_logits(tensors: dict[str, Tensor], row: Tensor, config: dict[str, Any] = LLADA) -> Tensor:
    """[T] → [T, V]: pre-norm blocks, x + Wo·attention(…) then x + Wdown(silu(Wgate·h) ∘ Wup·h), no mask anywhere."""
    w = {name.removeprefix("model.transformer."): tensor for name, tensor in tensors.items()}
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    x = w["wte.weight"][row]
    for layer in range(config["n_layers"]):
        b = {name.removeprefix(f"blocks.{layer}."): t for name, t in w.items() if name.startswith(f"blocks.{layer}.")}
        h = _rms(x, b["attn_norm.weight"], eps)
        q, k, v = (h @ b[f"{name}.weight"].T for name in ("q_proj", "k_proj", "v_proj"))
        x = x + _attention(q, k, v, config["n_heads"], theta) @ b["attn_out.weight"].T
        h = _rms(x, b["ff_norm.weight"], eps)
        gate = h @ b["ff_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ b["up_proj.weight"].T)) @ b["ff_out.weight"].T
    head = w["wte.weight"] if config["weight_tying"] else w["ff_out.weight"]
    return _rms(x, w["ln_f.weight"], eps) @ head.T


def dream_logits(tensors: dict[str, Tensor], row: Tensor, config: dict[str, Any] = DREAM) -> Tensor:
    """[T] → [T, V] as Dream's generation reads them: position i is answered at i - 1, and 0 by itself."""
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    x = tensors["model.embed_tokens.weight"][row]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        b = {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}
        h = _rms(x, b["input_layernorm.weight"], eps)
        q, k, v = (h @ b[f"self_attn.{n}_proj.weight"].T + b[f"self_attn.{n}_proj.bias"] for n in "qkv")
        x = x + _attention(q, k, v, config["num_attention_heads"], theta) @ b["self_attn.o_proj.weight"].T
        h = _rms(x, b["post_attention_layernorm.weight"], eps)
        gate = h @ b["mlp.gate_proj.weight"].T
        up = h @ b["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ b["mlp.down_proj.weight"].T
    logits = _rms(x, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].T
    return torch.cat([logits[:1], logits[:-1]])


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A folder as published: ``config.json`` and safetensors, in one file or in several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def rms_ratio(ours: Tensor, theirs: Tensor) -> float:
    """RMS of the error over RMS of the reference."""
    return float(((ours - theirs).double() ** 2).mean().sqrt() / (theirs.double() ** 2).mean().sqrt())


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g) * 0.3


def _norm(g: torch.Generator) -> Tensor:
    return 1 + 0.3 * torch.randn(WIDTH, generator=g)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, theta: float) -> Tensor:
    """[T, H·D] queries over [T, Hkv·D] keys and values, every position over every other → [T, H·D]."""
    size = q.shape[1] // heads
    per_key = heads // (k.shape[1] // size)
    out = []
    for head in range(heads):
        own, shared = slice(head * size, (head + 1) * size), head // per_key
        theirs = slice(shared * size, (shared + 1) * size)
        scores = _rotate(q[:, own], theta) @ _rotate(k[:, theirs], theta).T / size**0.5
        out.append(scores.softmax(-1) @ v[:, theirs])
    return torch.cat(out, -1)


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Pairs (x_j, x_{j + D/2}) of position t are turned by the angle t · θ^(-2j/D)."""
    half = x.shape[1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) * 2.0 / x.shape[1])
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
