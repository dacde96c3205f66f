"""Embeddings that also say which tokens came just before: e(x_t) + Σ_l M_l e(x_{t-l}), l = 1 … lags.

One layer of attention can then copy: a key that knows its predecessor is found by a query for what came before, which
otherwise takes a layer to write that down and a second one to look for it (the "smeared keys" of Olsson et al. 2022,
arXiv 2209.11895, as a short causal convolution with a full matrix a tap). Reading costs a few rows of a table more.

Knows a model's embedding. Does not know rows of keys and values; the tokens before a row's next ones are kept here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from accel.errors import IncompatibleError, OptionError

# the entry of a model's config that says how many tokens are looked back at
CONFIG_KEY = "embedding_lags"
# the name that the additional weights end in
LAG_WEIGHT = "lag_weight"
MAX_LAGS = 8
# stands where no token is
NOTHING = -1


def check_lags(lags: int) -> None:
    if isinstance(lags, bool) or not isinstance(lags, int) or not 0 <= lags <= MAX_LAGS:
        raise OptionError(f"lags={lags!r}: tokens to look back at are a whole number from 0 to {MAX_LAGS}")


class LaggedEmbedding(nn.Module):
    """``weight`` ``[V, H]`` as any embedding's, ``lag_weight`` ``[lags, H, H]``: M_1 first, zeros to begin with."""

    def __init__(self, weight: nn.Parameter, lags: int) -> None:
        super().__init__()
        self.weight = weight
        self.lags = lags
        width = weight.shape[1]
        self.lag_weight = nn.Parameter(weight.detach().new_zeros(lags, width, width))

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    def forward(self, tokens: Tensor) -> Tensor:
        """Whole texts ``[B, T]``, padded on the right if at all → ``[B, T, H]``."""
        return self.behind(tokens, tokens.new_full((len(tokens), self.lags), NOTHING))

    def behind(self, tokens: Tensor, before: Tensor) -> Tensor:
        """``tokens`` ``[B, n]`` behind ``before`` ``[B, lags]``, NOTHING where no token is → ``[B, n, H]``."""
        whole = torch.cat([before, tokens], 1)
        own = F.embedding(whole.clamp(min=0), self.weight) * (whole >= 0)[..., None]
        n = tokens.shape[1]
        out = own[:, self.lags :]
        for lag in range(1, self.lags + 1):
            out = out + F.linear(own[:, self.lags - lag : self.lags - lag + n], self.lag_weight[lag - 1])
        return out

    @torch.no_grad()
    def table(self) -> Tensor:
        """fp32 ``[(lags + 1) V + 1, H]``: what each token adds at each lag, 0 first, and last what nothing adds."""
        weight, lag_weight = self.weight.float(), self.lag_weight.float()
        return torch.cat(
            [weight, *(F.linear(weight, each) for each in lag_weight), weight.new_zeros(1, weight.shape[1])]
        )


def install(model: PreTrainedModel) -> PreTrainedModel:
    """Give a fresh model the embedding that its config asks for; one without ``CONFIG_KEY`` stays as it is."""
    lags = getattr(model.config, CONFIG_KEY, 0)
    check_lags(lags)
    if lags == 0:
        return model
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:
        raise IncompatibleError(
            f"lags={lags}: the embedding of {type(model).__name__} is a {type(embedding).__name__}, which does more "
            "than look up; use lags=0"
        )
    lagged = LaggedEmbedding(nn.Parameter(embedding.weight.data, embedding.weight.requires_grad), lags)
    model.set_input_embeddings(lagged)
    model.tie_weights()
    return model


def lagged_embedding(model: Any) -> LaggedEmbedding | None:
    """The model's embedding, where it looks back."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, LaggedEmbedding) else None


@dataclass
class _Row:
    """The last committed tokens, as many as there are lags, and those read behind them."""

    committed: list[int]
    tentative: list[int] = field(default_factory=list)


class Recent:
    """The last tokens of every row of a reader, opened, read, committed, forked and closed alongside its own."""

    def __init__(self, lags: int) -> None:
        self.lags = lags
        self._rows: dict[int, _Row] = {}

    def open(self, name: int) -> None:
        self._rows[name] = _Row([NOTHING] * self.lags)

    def close(self, names: Iterable[int]) -> None:
        for name in names:
            del self._rows[name]

    def fork(self, name: int, copies: Iterable[int]) -> None:
        for copy in copies:
            self._rows[copy] = _Row(list(self._rows[name].committed))

    def read(self, names: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Note tentative tokens of each row; what stood before them, ``[R, lags]``."""
        before = []
        for name, new in zip(names, tokens, strict=True):
            row = self._rows[name]
            before.append([*row.committed, *row.tentative][-self.lags :])
            row.tentative += new
        return before

    def commit(self, names: Sequence[int], keep: Sequence[int]) -> None:
        """The first ``keep[r]`` tentative tokens of each row stay."""
        for name, count in zip(names, keep, strict=True):
            row = self._rows[name]
            row.committed = [*row.committed, *row.tentative[:count]][-self.lags :]
            row.tentative = []
