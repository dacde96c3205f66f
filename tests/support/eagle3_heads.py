"""Random EAGLE-3 heads in the published layouts, and the published computation stated plainly: from scratch, uncached.

Shares no code with ``accel.drafters.eagle3``: rotations are complex numbers, attention is a loop over heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

HEADS, KV_HEADS, HEAD_DIM, INNER, EPS = 4, 2, 6, 20, 1e-5


@dataclass
class Head:
    """What was written to a folder, in speculators' names, and what the words in its config mean."""

    weights: dict[str, Tensor]
    # into the target's hidden_states
    ids: tuple[int, ...]
    # target id of each draft id
    kept: list[int]
    theta: float = 10000.0
    num_layers: int = 1
    switches: dict[str, bool] = field(default_factory=dict)

    def on(self, name: str) -> bool:
        return self.switches.get(name, False)


def random_head(
    target: PreTrainedModel,
    ids: tuple[int, ...],
    kept: list[int] | None = None,
    *,
    layer: str = "llama",
    size: int | None = None,
    own_embedding: bool = False,
    seed: int = 0,
    num_layers: int = 1,
    theta: float = 10000.0,
    **switches: bool,
) -> Head:
    """``size``: the head's hidden size where it is not the target's; ``kept``: the target ids it can draft."""
    generator = torch.Generator().manual_seed(seed)
    width, vocab = target.config.hidden_size, target.config.vocab_size
    size = size or width

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5

    def norm(length: int) -> Tensor:
        return 1 + 0.3 * torch.randn(length, generator=generator)

    weights = {"fc.weight": weight(size, len(ids) * width), "norm.weight": norm(size)}
    for i in range(num_layers):
        read = 2 * size if i == 0 else size
        weights |= {
            f"layers.{i}.self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, read),
            f"layers.{i}.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, read),
            f"layers.{i}.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, read),
            f"layers.{i}.self_attn.o_proj.weight": weight(size, HEADS * HEAD_DIM),
            f"layers.{i}.mlp.gate_proj.weight": weight(INNER, size),
            f"layers.{i}.mlp.up_proj.weight": weight(INNER, size),
            f"layers.{i}.mlp.down_proj.weight": weight(size, INNER),
            f"layers.{i}.input_layernorm.weight": norm(size),
            f"layers.{i}.post_attention_layernorm.weight": norm(size),
        }
        if layer == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"layers.{i}.self_attn.{name}.weight"] = norm(HEAD_DIM)
    weights["layers.0.hidden_norm.weight"] = norm(size)
    if switches.get("norm_before_fc"):
        weights["input_norm.weight"] = norm(len(ids) * width)
    if switches.get("fc_norm"):
        weights |= {f"fc_norm.{i}.weight": norm(width) for i in range(len(ids))}
    if own_embedding:
        weights["embed_tokens.weight"] = weight(vocab, size) * size**0.5
    chosen = list(range(vocab)) if kept is None else kept
    weights["lm_head.weight"] = 3 * weight(len(chosen), size)
    if kept is not None:
        weights["d2t"] = torch.tensor(kept) - torch.arange(len(kept))
        weights["t2d"] = torch.isin(torch.arange(vocab), torch.tensor(kept))
    return Head(weights, ids, chosen, theta, num_layers, switches)


def write(head: Head, folder: Path, target: PreTrainedModel, layout: str, **changes: Any) -> Path:
    """Save as ``layout``: "speculators", "safeailab" (the default ids) or "specforge" (ids one lower, nested)."""
    size = head.weights["norm.weight"].shape[0]
    qwen3 = "layers.0.self_attn.q_norm.weight" in head.weights
    layer: dict[str, Any] = {
        "model_type": "qwen3" if qwen3 else "llama",
        "hidden_size": size,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": head.num_layers,
        "rms_norm_eps": EPS,
        "vocab_size": target.config.vocab_size,
        "max_position_embeddings": 32,
        "hidden_act": "silu",
    }
    extra: dict[str, Any] = {"draft_vocab_size": len(head.kept), **head.switches}
    if size != target.config.hidden_size:
        extra["target_hidden_size"] = target.config.hidden_size
    if layout == "speculators":
        layer["rope_parameters"] = {"rope_type": "default", "rope_theta": head.theta}
        ids = {"eagle_aux_hidden_state_layer_ids": list(head.ids)}
        algorithm = {"algorithm": "eagle3", "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}]}
        config = {"speculators_model_type": "eagle3", "speculators_config": algorithm, **ids}
        config |= {"architectures": ["Eagle3Speculator"], "transformer_layer_config": layer, **extra}
    else:
        config = layer | extra | {"architectures": ["LlamaForCausalLM"], "rope_scaling": None, "torch_dtype": "float16"}
        if head.theta != 10000.0:
            config["rope_theta"] = head.theta
        if layout == "specforge":
            config["architectures"] = ["LlamaForCausalLMEagle3"]
            config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in head.ids]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    weights = head.weights
    if layout != "speculators":
        weights = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in weights.items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def draft(head: Head, target: PreTrainedModel, tokens: list[int], choices: list[int]) -> list[Tensor]:
    """Logits over the draft vocabulary for each step of a chain after ``tokens`` that drafts ``choices`` (target ids).

    One more than there are choices: the first is drawn from the first, and so on.
    """
    w = head.weights
    features = _project(head, torch.cat([_hidden(target, tokens[:-1], id) for id in head.ids], dim=-1))  # [n-1, H]
    table = w.get("embed_tokens.weight", target.get_input_embeddings().weight)
    read = tokens[1:]
    steps = []
    for choice in [*choices, None]:
        hidden = features
        for i in range(head.num_layers):
            hidden = _layer(head, i, F.embedding(torch.tensor(read), table), hidden)
        normed = _norm(hidden[-1], w["norm.weight"])
        steps.append(normed @ w["lm_head.weight"].T)
        if choice is not None:
            features = torch.cat([features, (normed if head.on("norm_output") else hidden[-1])[None]])
            read = [*read, choice]
    return steps


def _hidden(target: PreTrainedModel, tokens: list[int], id: int) -> Tensor:
    """``hidden_states[id]`` of the target, the last one as the final norm reads it."""
    seen: list[Tensor] = []
    decoder = target.get_decoder()
    final = next(m for name, m in decoder.named_children() if name in ("norm", "ln_f", "final_layer_norm"))
    handle = final.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        states = target(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    return (seen[0] if id == target.config.num_hidden_layers else states[id])[0]


def _project(head: Head, states: Tensor) -> Tensor:
    w = head.weights
    if head.on("norm_before_fc"):
        states = _norm(states, w["input_norm.weight"])
    if head.on("fc_norm"):
        parts = states.split(states.shape[-1] // len(head.ids), dim=-1)
        states = torch.cat([_norm(part, w[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)], dim=-1)
    return states @ w["fc.weight"].T


def _layer(head: Head, i: int, embeds: Tensor, hidden: Tensor) -> Tensor:
    w = {name.removeprefix(f"layers.{i}."): t for name, t in head.weights.items() if name.startswith(f"layers.{i}.")}
    if i == 0:
        normed = _norm(hidden, w["hidden_norm.weight"])
        if head.on("norm_before_residual"):
            hidden = normed
        normed = torch.cat([_norm(embeds, w["input_layernorm.weight"]), normed], dim=-1)
    else:
        normed = _norm(hidden, w["input_layernorm.weight"])
    hidden = hidden + _attention(head, w, normed)
    normed = _norm(hidden, w["post_attention_layernorm.weight"])
    inner = F.silu(normed @ w["mlp.gate_proj.weight"].T) * (normed @ w["mlp.up_proj.weight"].T)
    return hidden + inner @ w["mlp.down_proj.weight"].T


def _attention(head: Head, w: dict[str, Tensor], x: Tensor) -> Tensor:
    n = len(x)
    q, k, v = (
        (x @ w[f"self_attn.{name}_proj.weight"].T).view(n, -1, HEAD_DIM).transpose(0, 1) for name in ("q", "k", "v")
    )
    if "self_attn.q_norm.weight" in w:
        q, k = _norm(q, w["self_attn.q_norm.weight"]), _norm(k, w["self_attn.k_norm.weight"])
    q, k = _rotate(q, head.theta), _rotate(k, head.theta)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    out = []
    for h in range(HEADS):
        shared = h // (HEADS // KV_HEADS)
        scores = (q[h] @ k[shared].T) / HEAD_DIM**0.5
        out.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[shared])
    return torch.cat(out, dim=-1) @ w["self_attn.o_proj.weight"].T


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions ``[heads, n, D]``: entries d and d + D/2 are one complex number, turned by position."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
