"""Masked-diffusion language models: what is known of them, how they are loaded, and their bidirectional logits."""

from __future__ import annotations

from accel.models.diffusion.denoiser import BlockCache, Denoiser
from accel.models.diffusion.facts import CONFIG_KEY, DiffusionFacts, facts_of, set_facts

__all__ = ["CONFIG_KEY", "BlockCache", "Denoiser", "DiffusionFacts", "facts_of", "set_facts"]
