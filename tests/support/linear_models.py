"""Tiny models with linear attention, and their equation written out token by token in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.models.linear import Conversion, LinearSpec, LowRank, linear_layers, weight_shapes


def random_tensors(config: Any, spec: LinearSpec, low_rank: LowRank | None = None, seed: int = 5) -> dict[str, Tensor]:
    """A conversion's tensors, far enough from their start values that every part of the layer counts."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in weight_shapes(spec, config, low_rank).items():
        noise = torch.randn(shape, generator=draw)
        if name.endswith("taps"):
            noise = 0.4 * noise
            noise[..., -1] += 1
        elif name.endswith("gate_bias"):
            noise = 3 * noise
        elif name.endswith(("lora_A", "lora_B")):
            noise = 0.2 * noise
        tensors[name] = noise
    return tensors


def convert(model: Any, *, seed: int = 5, **spec: Any) -> Conversion:
    """Install random linear attention on a model; in all layers unless ``layers`` says which."""
    config = model.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {"layers": tuple(range(config.num_hidden_layers)), "feature_size": heads // 2, "gate_rank": 3} | spec
    chosen = LinearSpec(**settings)
    conversion = Conversion(model, chosen, random_tensors(config, chosen, seed=seed))
    conversion.install()
    return conversion


def rotated(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of x [T, H, D] at positions [T], in halves."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def naive(layer: Any, hidden: Tensor) -> Tensor:
    """One linear layer of one sequence [T, hidden] by its equations, one token at a time, in fp64."""
    spec, heads = layer.spec, layer.heads
    hidden, T = hidden.double(), len(hidden)
    H, D, group = heads.queries, heads.width, heads.queries // heads.keys

    def project(linear: Any) -> Tensor:
        out = hidden @ linear.weight.double().T
        return (out if linear.bias is None else out + linear.bias.double()).view(T, -1, D)

    def normed(x: Tensor, norm: Any) -> Tensor:
        if norm is None:
            return x
        return norm.weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    q, k, v = normed(project(layer.q_proj), layer.q_norm), normed(project(layer.k_proj), layer.k_norm), None
    v = project(layer.v_proj)
    log_decay = torch.zeros(T, heads.keys, 2 * spec.feature_size, dtype=torch.float64)
    if layer.gate_up is not None:
        inner = hidden if layer.gate_down is None else hidden @ layer.gate_down.double().T
        logits = (inner @ layer.gate_up.double().T + layer.gate_bias.double()).view(T, heads.keys, -1)
        log_decay = torch.nn.functional.logsigmoid(logits) / spec.gate_normalizer
        if spec.min_log_decay is not None:
            log_decay = log_decay.clamp(min=spec.min_log_decay)
    turned_q, turned_k = rotated(q, torch.arange(T)), rotated(k, torch.arange(T))
    k, v, log_decay, turned_k = (x.repeat_interleave(group, dim=1) for x in (k, v, log_decay, turned_k))
    if spec.rope:
        q, k = turned_q, turned_k
    maps = [layer.q_map, layer.q_map if layer.k_map is None else layer.k_map]
    taps = [layer.q_taps, layer.q_taps if layer.k_taps is None else layer.k_taps]

    def mapped(x: Tensor, which: int, t: int) -> Tensor:
        z = x[t]
        if taps[which] is not None:
            z = sum(taps[which][:, :, 3 - back].double() * x[t - back] for back in range(min(4, t + 1)))
            z = torch.nn.functional.silu(z) if spec.activation else z
        scores = torch.einsum("hd,hdf->hf", z, maps[which].double())
        return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1).clamp(min=1e-12)

    out = torch.zeros(T, H, D, dtype=torch.float64)
    S, z = torch.zeros(H, D, D, dtype=torch.float64), torch.zeros(H, D, dtype=torch.float64)
    weight = torch.zeros(H, 1) if layer.window_factors is None else layer.window_factors.double().sigmoid()[:, None]
    for t in range(T):
        entering, a = t if spec.covers_window else t - spec.window, log_decay[t].exp()
        S, z = a[:, :, None] * S, a * z
        if entering >= 0:
            key = mapped(k, 1, entering)
            S, z = S + key[:, :, None] * v[entering][:, None, :], z + key
        query = mapped(q, 0, t) * (D**-0.5 if spec.scaled else 1.0)
        num, den = torch.einsum("hk,hkv->hv", query, S), (query * z).sum(-1, keepdim=True)
        if spec.affine:
            num, den = (1 - weight) * num, (1 - weight) * den
        if spec.window:
            near = slice(max(0, t + 1 - spec.window), t + 1)
            scores = torch.einsum("shd,hd->hs", turned_k[near], turned_q[t]) * D**-0.5
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            num = num + weight * torch.einsum("hs,shv->hv", e, v[near])
            den = den + weight * e.sum(-1, keepdim=True)
        out[t] = num / (den + spec.eps) if spec.normalised else num
    o = out.reshape(T, H * D) @ layer.o_proj.weight.double().T
    return o if layer.o_proj.bias is None else o + layer.o_proj.bias.double()


def naive_logits(model: Any, tokens: list[int]) -> Tensor:
    """[T, V]: the whole model with every linear layer in its place computed by ``naive``."""
    before = {id(layer): layer.forward for layer in linear_layers(model)}
    for layer in linear_layers(model):
        layer.forward = lambda hidden_states, _layer=layer, **_: (naive(_layer, hidden_states[0])[None].float(), None)
    try:
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        for layer in linear_layers(model):
            assert id(layer) in before
            del layer.forward


def error(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected."""
    return float((got.double() - expected.double()).pow(2).mean().sqrt() / expected.double().pow(2).mean().sqrt())
