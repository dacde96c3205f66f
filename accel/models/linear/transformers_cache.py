"""Linear layers inside transformers' own forward and generate(): a cache layer with a memory, and the padding mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from accel.errors import IncompatibleError
from accel.models.linear.memory import Memory, Projected, attend

if TYPE_CHECKING:
    from accel.models.linear.layer import LinearAttention


class Padding:
    """The padding of the call under way, bool [B, T], True at tokens; None where nothing is padded.

    A hook on the decoder reads it, because what a layer gets is the mask of softmax attention, in any of its forms.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def before(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook (with keyword arguments)."""
        self.mask = None
        given = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if given is None:
            return
        if not isinstance(given, Tensor) or given.ndim != 2:
            what = f"one of {given.ndim} dimensions" if isinstance(given, Tensor) else type(given).__name__
            raise IncompatibleError(
                f"attention_mask is {what}: linear attention reads every token before; give [batch, length] with "
                "zeros at padding, or none"
            )
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        mask = given[:, -inputs.shape[1] :].bool()
        # asking a GPU for it would wait for the device
        self.mask = None if mask.device.type == "cpu" and bool(mask.all()) else mask


class LinearCacheLayer(CacheLayerMixin):
    """The memory of one linear layer in a transformers cache. It cannot be cropped: a state does not go back."""

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory | None = None
        self._num_tokens = 0

    def attend(self, layer: LinearAttention, x: Projected, mask: Tensor | None) -> Tensor:
        """Outputs of the new tokens behind those before; remembers them."""
        out, self.memory = attend(layer, x, self.memory, mask=mask)
        self._num_tokens += x.q.shape[1]
        return out

    def _each(self, change: Any) -> None:
        if self.memory is not None:
            parts = [None if part is None else type(part)(*(change(each) for each in part)) for part in self.memory]
            self.memory = Memory(*cast(Any, parts))

    # what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory comes with the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise IncompatibleError("a cache filled by linear attention was given to softmax attention: start a new one")

    def get_seq_length(self, *args: Any) -> int:
        return self._num_tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        n = query_length if isinstance(query_length, int) else len(query_length)
        return self._num_tokens + n, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.memory, self._num_tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda each: each.index_select(0, beam_idx.to(each.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda each: each.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda each: each[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise IncompatibleError(
                "a linear layer's state cannot be cropped: speculate with accel.attach(), whose rows can take tokens "
                "back, instead of transformers' assisted generation"
            )

    def offload(self) -> None:
        """Stays: it is small and of one size."""

    def prefetch(self) -> None:
        """Stays: it is small and of one size."""


def cache_layer(cache: Cache, index: int) -> LinearCacheLayer:
    """The memory of layer ``index`` in a cache that transformers made, put in the place of its empty layer."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[index]
    if isinstance(found, LinearCacheLayer):
        return found
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise IncompatibleError(
            f"past_key_values has a {type(found).__name__} for layer {index}: linear attention takes a DynamicCache"
        )
    if found.is_initialized:
        raise IncompatibleError(
            f"past_key_values holds keys of layer {index}, whose attention is linear now: start with an empty cache"
        )
    cache.layers[index] = LinearCacheLayer()
    return cast(LinearCacheLayer, cache.layers[index])
