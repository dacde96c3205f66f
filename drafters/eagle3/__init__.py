"""EAGLE-3 draft heads (Li et al. 2025, arXiv 2503.01840): one decoder layer that reads the target's hidden states.

``config`` reads a checkpoint's config.json, ``head`` computes, ``loading`` fits a head to its target, ``tap`` brings
the target's hidden states, ``drafter`` drafts with all of these.
"""

from accel.drafters.eagle3.config import is_head
from accel.drafters.eagle3.drafter import Eagle3Drafter
from accel.drafters.eagle3.loading import load_head

__all__ = ["Eagle3Drafter", "is_head", "load_head"]
