"""The attention function that reads a ``RowCache``, registered with transformers as ``accel_rows``.

transformers builds no mask for an implementation it has no mask function for, which is what we want: the mask of a
row depends on its own length, and the cache knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from accel.kernels.prefix_attention import prefix_attention
from accel.models.row_cache import LayerView

NAME = "accel_rows"

# Families whose attention is exactly "causal, with an optional sliding window and soft-cap", proved equal by
# tests/models/test_target.py. Every other model runs its own attention on left-padded tensors: slower, as correct.
FAMILIES = frozenset(
    {
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
    }
)


def supports_rows(config: PreTrainedConfig) -> bool:
    """Whether ``row_attention`` may stand in for this model's own attention."""
    return (
        config.model_type in FAMILIES
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and not getattr(config, "use_bidirectional_attention", False)
        # gpt2's upcast attention and cross-attention leave the attention interface
        and not getattr(config, "reorder_and_upcast_attn", False)
        and not getattr(config, "add_cross_attention", False)
    )


# (view of the layer, query [R, H, n, D], scale), for as long as somebody is ``watching``
Watcher = Callable[[LayerView, Tensor, float], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: LayerView,
    value: LayerView,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query ``[R, H, n, D]`` → ``[R, n, H, D]``."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    watcher = _watcher.get()
    if watcher is not None:
        watcher(key, query, scale)
    out = prefix_attention(
        query,
        key.keys,
        key.values,
        key.plan(sliding_window, query.device, query.dtype),
        key.segments(),
        scale=scale,
        softcap=softcap,
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, row_attention)


@contextmanager
def using_rows(config: PreTrainedConfig) -> Iterator[None]:
    """Let the model's layers call ``row_attention`` for the length of a forward pass."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def is_watched() -> bool:
    """Whether queries must pass through ``row_attention``, where somebody looks at them."""
    return _watcher.get() is not None


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show every layer's queries to ``watcher`` for the length of the context, in this thread alone."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
