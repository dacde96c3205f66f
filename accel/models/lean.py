"""The forward pass of llama-like models on a CPU, in as few torch calls as its equations need.

Between its products a general model class spends several times what a draft of a few million parameters multiplies in
all, and a fifth of a step of a model of 100 million. This is the same decoder (RMSNorm, rotary embeddings, grouped
heads, gated SiLU) over the same rows. A target is read through the model's own linear layers, whatever stands in their
place; a draft through copies of its matrices that are joined where they read one input. What lies between the products
is compiled (``accel.kernels.row_step``) where the machine has a C compiler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from accel.artifacts.resolve import compiled_folder
from accel.kernels import row_step
from accel.kernels.row_step import reference
from accel.kernels.row_step.compiled import HEAD_SIZE_MULTIPLE, MAX_HEAD_SIZE
from accel.kernels.row_step.reference import PANEL
from accel.models import cpu_linear
from accel.models.attention import is_watched, row_attention
from accel.models.linear import LinearTarget, is_linear
from accel.models.row_cache import MIN_TAIL_CAPACITY, Segment, Step
from accel.models.softmax_target import SoftmaxTarget

# Proved equal to transformers' own by tests/models/test_lean.py
CLASSES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# rotations whose angles do not depend on how long the text is
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
# with more than these, products outweigh calls, and joined weights are a copy worth saving
MAX_PARAMETERS = 100_000_000
# SDPA's larger tiles read keys fewer times: it wins where a row brings more tokens
MAX_COMPILED_TOKENS = 256

# (layer, queries [N, H · D], keys and values [N, Hkv · D]) → [N, H · D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def target_for(model: PreTrainedModel) -> SoftmaxTarget:
    """What the rows of ``model`` are read with: states where it has linear layers, keys and values where not."""
    if is_linear(model):
        return LinearTarget(model)
    return LeanTarget(model) if _reads(model) else SoftmaxTarget(model)


def draft_reader(model: PreTrainedModel) -> SoftmaxTarget:
    """What a drafter reads ``model`` with: joined matrices where that is known to say the same."""
    return LeanDraft(model) if supports(model) else target_for(model)


def _reads(model: PreTrainedModel) -> bool:
    """Whether the lean pass may stand for the model's own, in the model's own precision."""
    return _is_known(model) and model.dtype == torch.float32 and _is_unchanged(_frame(model))


def _is_known(model: PreTrainedModel) -> bool:
    """Whether the equations here are this model's: its own class, on a CPU."""
    if type(model) not in CLASSES or model.device.type != "cpu" or is_linear(model):
        return False
    config = model.config
    return (
        config.hidden_act == "silu"
        and config.rope_parameters.get("rope_type", "default") in ROTATIONS
        and not (type(model) is MistralForCausalLM and config.sliding_window is not None)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    )


def supports(model: PreTrainedModel) -> bool:
    """Whether a draft's joined matrices compute what this model computes: nobody's changes in it."""
    return (
        _is_known(model)
        and model.dtype.is_floating_point
        and model.num_parameters() <= MAX_PARAMETERS
        and all(_is_untouched(module) for module in model.modules())
        # torch does not tell when these are written to
        and not any(parameter.is_inference() for parameter in model.parameters())
    )


def _is_untouched(module: nn.Module) -> bool:
    """No hook on it, no forward put in its place, no stranger in a linear layer's place (LoRA, quantised)."""
    changed = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return not changed and (not isinstance(module, nn.Linear) or type(module) is nn.Linear)


# a module and the children that it had
Frame = list[tuple[nn.Module, tuple[nn.Module | None, ...]]]
_LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"})


def _frame(model: PreTrainedModel) -> Frame:
    """The modules whose own forward a lean pass leaves out: all but the linear layers, which it calls."""
    found: Frame = []
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        found.append((module, _children(module)))
        waiting += [child for child in _children(module) if child is not None]
    return found


def _children(module: nn.Module) -> tuple[nn.Module | None, ...]:
    return tuple(child for name, child in module._modules.items() if name not in _LINEARS)


def _is_unchanged(frame: Frame) -> bool:
    """Whether calling these modules would still be what their classes say."""
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or _children(module) != children
        for module, children in frame
    )


class _Joined:
    """Linear layers that read one input, as one fp32 ``linear``; it follows when a weight of theirs is changed."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.parts = parts
        inputs, outputs = parts[0].in_features, sum(part.out_features for part in parts)
        # nobody's random numbers are touched
        has_bias = parts[0].bias is not None
        self.linear = nn.Linear(inputs, outputs, has_bias, device="meta", dtype=torch.float32).requires_grad_(False)
        self._made_of: tuple[object, ...] = ()
        self._is_own = False
        self.refresh()

    def refresh(self) -> None:
        weights = (w for part in self.parts for w in part._parameters.values() if w is not None)
        now = tuple((w.data_ptr(), w._version) for w in weights)
        if now == self._made_of:
            return
        self._made_of = now
        first = self.parts[0]
        if len(self.parts) == 1 and first.weight.dtype == torch.float32:
            self.linear.weight, self.linear.bias, self._is_own = first.weight, first.bias, False
            return
        if not self._is_own:
            self.linear.weight, self.linear.bias = (
                None if old is None else nn.Parameter(torch.empty(old.shape, dtype=torch.float32), requires_grad=False)
                for old in (self.linear.weight, self.linear.bias)
            )
            self._is_own = True
        # written in place, so that whoever packed the old values can see that they changed
        self.linear.weight.copy_(torch.cat([part.weight for part in self.parts]))
        if self.linear.bias is not None:
            self.linear.bias.copy_(torch.cat([part.bias for part in self.parts]))


class _Layer(ABC):
    """One decoder layer: its norms as they are, its products by name. ``[N, …]`` → ``[N, …]``."""

    def __init__(self, layer: Any) -> None:
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        # qwen3 also normalises each query and key
        self.query_norm = getattr(layer.self_attn, "q_norm", None)
        self.key_norm = getattr(layer.self_attn, "k_norm", None)

    @abstractmethod
    def products(self) -> Sequence[Sequence[nn.Module]]:
        """Its linear layers: queries, keys and values; out; gate and up; down."""

    @abstractmethod
    def qkv(self, x: Tensor) -> Sequence[Tensor]: ...

    @abstractmethod
    def out(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def gate_up(self, x: Tensor) -> Sequence[Tensor]: ...

    @abstractmethod
    def down(self, x: Tensor) -> Tensor: ...


class _OwnLayer(_Layer):
    """One decoder layer, its linear layers called where they stand."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._attention, self._mlp = layer.self_attn, layer.mlp

    def products(self) -> Sequence[Sequence[nn.Module]]:
        attention, mlp = self._attention, self._mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        return qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)

    def qkv(self, x: Tensor) -> Sequence[Tensor]:
        attention = self._attention
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    def out(self, x: Tensor) -> Tensor:
        return self._attention.o_proj(x)

    def gate_up(self, x: Tensor) -> Sequence[Tensor]:
        return self._mlp.gate_proj(x), self._mlp.up_proj(x)

    def down(self, x: Tensor) -> Tensor:
        return self._mlp.down_proj(x)


class _JoinedLayer(_Layer):
    """One decoder layer as four matrices."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = _Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._sizes = [part.out_features for part in self._qkv.parts]
        self._out = _Joined([attention.o_proj])
        self._gate_up = _Joined([mlp.gate_proj, mlp.up_proj])
        self._down = _Joined([mlp.down_proj])

    def products(self) -> Sequence[Sequence[nn.Module]]:
        return (self._qkv.linear,), (self._out.linear,), (self._gate_up.linear,), (self._down.linear,)

    def joined(self) -> list[_Joined]:
        return [self._qkv, self._out, self._gate_up, self._down]

    def qkv(self, x: Tensor) -> Sequence[Tensor]:
        return self._qkv.linear(x).split(self._sizes, -1)

    def out(self, x: Tensor) -> Tensor:
        return self._out.linear(x)

    def gate_up(self, x: Tensor) -> Sequence[Tensor]:
        return self._gate_up.linear(x).chunk(2, -1)

    def down(self, x: Tensor) -> Tensor:
        return self._down.linear(x)


class LeanTarget(SoftmaxTarget):
    """A ``SoftmaxTarget`` whose forward pass is its own, and which reads rows of different lengths without padding.

    Where somebody watches or changes what the model does between its linear layers (taps, hooks, autocast), the model's
    own pass runs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config = model.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_size: int = model.model.layers[0].self_attn.head_dim
        self._scale = self._head_size**-0.5
        self._frame = _frame(model)
        self._layers: Sequence[_Layer] = [_OwnLayer(layer) for layer in model.model.layers]
        # cosine and signed sine of every position so far
        self._angles = torch.empty(2, 0, self._head_size, dtype=torch.float32)
        self._compiled = row_step.compiled(compiled_folder())
        self._eps: float = config.rms_norm_eps
        self._has_looked = self._is_as_known = False
        # the layers as one compiled call, by number of tokens, since the last look
        self._stacks: dict[int, row_step.Stack | None] = {}

    def open(self, segments: Iterable[Segment] = ()) -> int:
        """A new, empty row. All rows are read from here on with what stands in the model now.

        Looking at every module takes a tenth of a small model's step, so that it is not done in each.
        """
        self._has_looked = False
        return super().open(segments)

    def _look(self) -> None:
        """Find out what stands in the model: whether the pass of this class says what the model itself would say."""
        model = self.model
        self._is_as_known = model.dtype == torch.float32 and model.device == self.device and _is_unchanged(self._frame)

    def _may_run(self) -> bool:
        if not self._has_looked:
            self._has_looked = True
            self._stacks = {}
            self._look()
        return self._is_as_known and not self.taps and not torch.is_autocast_enabled("cpu")

    def _embedded(self, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        """tokens ``[R, n]`` → ``[R · n, H]``."""
        embedding = self.model.model.embed_tokens
        x = embedding(tokens) if self.lagged is None else self.lagged.behind(tokens, self._before(rows, tokens))
        return x.flatten(0, 1)

    def _head(self, x: Tensor) -> Tensor:
        return self.model.lm_head(x)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        rows: Sequence[int],
        keep: Sequence[int] | None = None,
        final: Sequence[int] | None = None,
    ) -> Tensor:
        """Add n tentative tokens to rows: ``[R, n]`` → fp32 logits ``[R, n, V]``, or ``[R, len(keep), V]``."""
        if not self._may_run():
            return super().forward(tokens, rows, keep, final)
        x = self._pass(self._embedded(tokens, rows), self.cache.begin(rows, tokens.shape[1]), None)
        if keep is not None and len(keep) < tokens.shape[1]:
            # an index where one will do: a list becomes a tensor first
            kept = keep[0] if len(keep) == 1 else list(keep)
            x = x.view(*tokens.shape, -1)[:, kept].reshape(len(rows) * len(keep), -1).contiguous()
        return self._logits(x).view(len(rows), -1, self.vocab_size)

    @torch.no_grad()
    def forward_ragged(self, tokens: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
        """``forward`` of the first lengths[r] ≥ 1 of the n tokens of each row, for the price of these alone.

        tokens ``[R, n]`` → fp32 logits ``[lengths[r], V]`` of each row. No more than these may be committed.
        """
        n = tokens.shape[1]
        if not self._may_run():
            return [each[:length] for each, length in zip(super().forward(tokens, rows), lengths, strict=True)]
        x = self._embedded(tokens, rows)
        x = self._pass(x, self.cache.begin(rows, n), None if min(lengths) == n else lengths)
        return list(self._logits(x).split(list(lengths)))

    def may_branch(self, row: int) -> bool:
        """Whether ``forward_branches`` reads this row: with compiled attention, which is told who sees whom."""
        if self.recent is not None or self.cache.rows[row].segments or not self._may_run():
            return False
        return self._has_compiled_attention()

    @torch.no_grad()
    def forward_branches(self, tokens: Tensor, row: int, depths: Sequence[int]) -> Tensor:
        """``forward`` of several continuations of one row at once: tokens ``[n]`` → fp32 logits ``[n, V]``.

        Token i is ``depths[i]`` ≤ i positions behind the row; of the new ones it sees the first depths[i] and itself.
        ``may_branch`` says whether that can be asked.
        """
        step = self.cache.begin([row], len(tokens))
        return self._logits(self._pass(self._embedded(tokens[None], [row]), step, None, torch.tensor(depths)))

    def commit_path(self, path: Sequence[int], row: int) -> None:
        """Keep the tentative positions ``path`` of a row, which ascend and follow on one another; drop the rest."""
        self.cache.commit_path(row, path)

    def _pass(self, x: Tensor, step: Step, lengths: Sequence[int] | None, depths: Tensor | None = None) -> Tensor:
        """Embedded tokens ``[R · n, H]`` → hidden states ``[N, H]`` before the last norm: of all, or each row's first.

        ``x`` is written to.
        """
        present = None
        if lengths is not None:
            present = (torch.arange(step.n) < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0]
            x = x[present]
        self._know_angles(max(step.first_positions) + step.n)
        rows = self._compiled_rows(step, lengths)
        stack = None if rows is None else self._stack(len(x))
        if self._compiled is not None and rows is not None and stack is not None:
            stores = [self.cache.tails(i, self._kv_heads, self._head_size, x) for i in range(len(self._layers))]
            cosine, sine = self._angles.unbind()
            return self._compiled.layers(
                x, stack, rows, cosine, sine, stores, heads=self._heads, eps=self._eps, scale=self._scale, depths=depths
            )
        assert depths is None or rows is not None, "may_branch() asks first"
        attend = self._attention(step, present) if rows is None else self._compiled_attention(rows, depths)
        between = self._compiled or reference
        delta = None
        for index, layer in enumerate(self._layers):
            q, k, v = layer.qkv(between.add_norm(x, delta, *_norm(layer.before_attention)))
            if layer.query_norm is not None and layer.key_norm is not None:
                q, k = self._normed_heads(layer.query_norm, q), self._normed_heads(layer.key_norm, k)
            delta = layer.out(attend(index, q, k, v))
            gate, up = layer.gate_up(between.add_norm(x, delta, *_norm(layer.before_mlp)))
            delta = layer.down(between.silu_mul(gate, up))
        return x if delta is None else x.add_(delta)

    def _stack(self, num_tokens: int) -> row_step.Stack | None:
        """The layers as one compiled call; None where they are more than that, or a product is somebody else's."""
        key = min(num_tokens, cpu_linear.MEASURED_ROWS[-1] + 1)
        if key not in self._stacks:
            layers = [_compiled_layer(layer, key) for layer in self._layers]
            whole = [layer for layer in layers if layer is not None]
            self._stacks[key] = row_step.Stack(whole) if len(whole) == len(layers) else None
        return None if torch.is_autocast_enabled("cpu") else self._stacks[key]

    def _logits(self, x: Tensor) -> Tensor:
        between = self._compiled or reference
        return self._head(between.add_norm(x, None, *_norm(self.model.model.norm)))

    def _normed_heads(self, norm: Any, x: Tensor) -> Tensor:
        """RMSNorm of every head of ``[N, H · D]``."""
        weight, eps = _norm(norm)
        return reference.add_norm(x.unflatten(-1, (-1, self._head_size)), None, weight, eps).flatten(1)

    def _compiled_rows(self, step: Step, lengths: Sequence[int] | None) -> Tensor | None:
        """The rows as compiled attention over their tails takes them; None where that cannot be or does not pay."""
        if step.n > MAX_COMPILED_TOKENS or any(row.segments for row in step.rows) or not self._has_compiled_attention():
            return None
        counts = [step.n] * len(step.rows) if lengths is None else lengths
        return row_step.layout([row.slot for row in step.rows], step.starts, step.first_positions, counts)

    def _has_compiled_attention(self) -> bool:
        size = self._head_size
        return (
            self._compiled is not None and not size % HEAD_SIZE_MULTIPLE and size <= MAX_HEAD_SIZE and not is_watched()
        )

    def _compiled_attention(self, rows: Tensor, depths: Tensor | None) -> Attend:
        """The attention of this step over rows' tails, compiled."""
        compiled, (cosine, sine) = self._compiled, self._angles.unbind()
        assert compiled is not None, "_compiled_rows() asks first"

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.tails(layer, self._kv_heads, self._head_size, k)
            return compiled.attend(q, k, v, rows, cosine, sine, keys, values, scale=self._scale, depths=depths)

        return attend

    def _attention(self, step: Step, present: Tensor | None) -> Attend:
        """The attention of this step in torch, whatever the rows are made of."""
        n, size, num_tokens = step.n, self._head_size, len(step.rows) * step.n
        positions = (torch.tensor(step.first_positions)[:, None] + torch.arange(n)).flatten()
        cosine, sine = self._angles[:, positions if present is None else positions[present], None].unbind()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (each.unflatten(-1, (-1, size)) for each in (q, k, v))
            q, k = reference.rotate(q, cosine, sine), reference.rotate(k, cosine, sine)
            if present is not None:
                # attention and rows want every row as long as the longest; that is the cheap part
                q, k, v = (
                    each.new_zeros(num_tokens, *each.shape[1:]).index_copy_(0, present, each) for each in (q, k, v)
                )
            q, k, v = (each.unflatten(0, (-1, n)).transpose(1, 2) for each in (q, k, v))
            view, _ = self.cache.update(k, v, layer)
            out, _ = row_attention(self.model, q, view, view, None, scaling=self._scale)
            out = out.reshape(num_tokens, -1)
            return out if present is None else out[present]

        return attend

    def _know_angles(self, end: int) -> None:
        """Make the tables of the rotation reach position ``end``."""
        if end > self._angles.shape[1]:
            positions = torch.arange(max(MIN_TAIL_CAPACITY, 2 * end))
            cos, sin = self.model.model.rotary_emb(self._angles, positions[None])
            half = self._head_size // 2
            self._angles = torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)])


class LeanDraft(LeanTarget):
    """The lean pass of a draft: joined matrices, in fp32 whatever the model's precision."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        layers = [_JoinedLayer(layer) for layer in model.model.layers]
        self._layers = layers
        self._joined_head = _Joined([model.lm_head])
        self._joined = [*(joined for layer in layers for joined in layer.joined()), self._joined_head]
        self.linears = nn.ModuleList([joined.linear for joined in self._joined])
        # what a lagged embedding adds up
        self._table = torch.empty(0)
        self._table_made_of: tuple[object, ...] = ()

    def _look(self) -> None:
        # everything but the weights was looked at when the draft was attached
        self._is_as_known = True
        for joined in self._joined:
            joined.refresh()
        if self.lagged is not None:
            now = tuple((weight.data_ptr(), weight._version) for weight in self.lagged.parameters())
            if now != self._table_made_of:
                self._table, self._table_made_of = self.lagged.table(), now

    def _embedded(self, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        if self.recent is None:
            return F.embedding(tokens.reshape(-1), self.model.model.embed_tokens.weight).float()
        size, lags, known = self.vocab_size, self.recent.lags, tokens.tolist()
        # a row of the table for each lag: one sum of looked up rows and no product
        nothing = (lags + 1) * size
        places = []
        for before, new in zip(self.recent.read(rows, known), known, strict=True):
            whole = [*before, *new]
            for end in range(lags, len(whole)):
                seen = whole[end - lags : end + 1][::-1]
                places.append([nothing if token < 0 else lag * size + token for lag, token in enumerate(seen)])
        return F.embedding_bag(torch.tensor(places), self._table, mode="sum")

    def _head(self, x: Tensor) -> Tensor:
        return self._joined_head.linear(x)


def _compiled_layer(layer: _Layer, num_tokens: int) -> row_step.Layer | None:
    """A layer of whose products of so many tokens each is with panels, and between which nothing is unknown to C."""
    norms = [layer.before_attention.weight, layer.before_mlp.weight]
    products = [[cpu_linear.panels_of(each, num_tokens) for each in group] for group in layer.products()]
    known = [[each for each in group if each is not None and not each.outputs % PANEL] for group in products]
    is_whole = list(map(len, known)) == list(map(len, products)) and layer.query_norm is None
    if not is_whole or any(norm.dtype != torch.float32 or not norm.is_contiguous() for norm in norms):
        return None
    return row_step.Layer(*norms, *known)


def _norm(norm: Any) -> tuple[Tensor, float]:
    """An RMSNorm's weight and epsilon."""
    return norm.weight.float(), norm.variance_epsilon
