"""Low-rank additions to a model's linear layers: W x + (α / r) · B A x (Hu et al. 2021), and merging them into W.

Knows modules and their names. The model stays as it is: the additions are hooks, until they are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.errors import OptionError

# every linear layer but the head
ALL = "all"


class Addition(nn.Module):
    """B A for one linear layer; B begins at zero, so that the model begins as it was."""

    def __init__(self, linear: Any, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        inside, outside = linear.in_features, linear.out_features
        bound = inside**-0.5
        start = (torch.rand(rank, inside, generator=generator) * 2 - 1) * bound
        device = linear.weight.device
        self.a = nn.Parameter(start.to(device))
        self.b = nn.Parameter(torch.zeros(outside, rank, device=device))
        self.scale = alpha / rank

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(self.a.dtype) @ self.a.T @ self.b.T) * self.scale

    def product(self) -> Tensor:
        """What merging adds to the layer's weight, [out, in]."""
        return (self.b @ self.a) * self.scale


class Lora(nn.Module):
    """Additions to the layers of ``model`` that ``targets`` names, active until ``merge`` or ``remove``.

    ``targets``: ends of module names ("q_proj", "mlp.up_proj"), each of which must name a layer, or ("all",): every
    linear layer but the head.
    """

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str] = (ALL,), seed: int = 0
    ) -> None:
        super().__init__()
        if rank < 1 or alpha <= 0:
            raise OptionError(f"lora_rank={rank}, lora_alpha={alpha}: rank ≥ 1 and alpha > 0")
        self.names = layers(model, targets)
        modules = dict(model.named_modules())
        generator = torch.Generator().manual_seed(seed)
        linears = [modules[name] for name in self.names]
        self._pairs = [(linear, Addition(linear, rank, alpha, generator)) for linear in linears]
        self.additions = nn.ModuleList(addition for _, addition in self._pairs)
        self._hooks = [linear.register_forward_hook(_adding(addition)) for linear, addition in self._pairs]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer, copies of A [rank, in] and B [out, rank] as they are now; merging adds (alpha / rank) · B A."""
        return {
            name: (addition.a.detach().clone(), addition.b.detach().clone())
            for name, (_, addition) in zip(self.names, self._pairs, strict=True)
        }

    def merge(self) -> None:
        """Put the additions into the weights, and go."""
        with torch.no_grad():
            for linear, addition in self._pairs:
                weight = linear.weight
                weight.copy_((weight.float() + addition.product()).to(weight.dtype))
        self.remove()

    def remove(self) -> None:
        """Leave the model as it is without them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def layers(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The names of the linear layers meant; a target that names none is refused, never skipped."""
    head = model.get_output_embeddings()
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if not found:
        raise OptionError(f"{type(model).__name__} has no linear layers to add to: train all weights instead")
    if tuple(targets) == (ALL,):
        return found
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
    for target in targets:
        if not any(_ends(name, target) for name in found):
            raise OptionError(f"lora_targets: {target!r} names no linear layer; the model has {kinds}, or say 'all'")
    return [name for name in found if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _adding(addition: Addition) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + addition(given[0]).to(output.dtype)

    return hook
