"""Peers that compute attention or its linear form: torch's SDPA, flash-attn and fla, or why one is not here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from accel.bench.kernels.cases import Peer, Thunk, close


def sdpa(query: Tensor, keys: Tensor, values: Tensor, *, causal: bool, scale: float) -> Peer:
    """torch's attention, heads shared by GQA; query [B, H, n, D], keys and values [B, Hkv, L, D].

    On CUDA the flash backend alone is allowed: where it refuses, the peer fails and is named with its reason.
    """
    gqa = query.shape[1] != keys.shape[1]

    def run() -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=scale, enable_gqa=gqa)

    return Peer(_flash_only(run) if query.is_cuda else run)


def sdpa_folded(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Peer:
    """The same where every query sees every key: a group's heads lie on the query axis and share one key head."""
    B, H, n, D = query.shape
    folded = query.reshape(B, keys.shape[1], H // keys.shape[1] * n, D)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(folded, keys, values, scale=scale).view(B, H, n, -1)

    return Peer(_flash_only(run) if query.is_cuda else run)


def _flash_only(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def forced() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return run()

    return forced


def flash_attn(query: Tensor, keys: Tensor, values: Tensor, *, causal: bool, scale: float) -> Peer:
    """flash-attn's prefill; its layout is [B, T, H, D], made here, off the clock."""

    def bind(function: Any) -> Thunk:
        flat = [x.transpose(1, 2).contiguous() for x in (query, keys, values)]
        return lambda: function(*flat, causal=causal, softmax_scale=scale).transpose(1, 2)

    return imported("flash_attn", "flash_attn_func", bind)


def flash_attn_cache(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Peer:
    """flash-attn's decode over a filled cache; it splits the sequence over processors."""

    def bind(function: Any) -> Thunk:
        flat = [x.transpose(1, 2).contiguous() for x in (query, keys, values)]
        lengths = torch.full((len(query),), keys.shape[2], dtype=torch.int32, device=query.device)
        return lambda: function(*flat, cache_seqlens=lengths, softmax_scale=scale, causal=True).transpose(1, 2)

    return imported("flash_attn", "flash_attn_with_kvcache", bind)


def compared(found: Mapping[str, Peer], ours: Thunk, allowed: float) -> dict[str, Peer]:
    """The peers, each to be held against our result before it is timed: another figure is of other work."""
    return {
        name: replace(peer, agrees=lambda theirs: close("output", theirs, ours(), allowed))
        for name, peer in found.items()
    }


def imported(module: str, name: str, bind: Callable[[Any], Thunk]) -> Peer:
    """A peer that ``bind`` makes of ``module.name``; the reason, in the import's own words, where there is none."""
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # a package built for another torch or driver fails in its own ways
        return Peer(None, f"cannot import {module}.{name}: {type(error).__name__}: {error}".splitlines()[0])
    return Peer(bind(function))
