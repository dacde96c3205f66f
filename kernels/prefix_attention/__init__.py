"""Prefix attention: new positions of each row over shared segments plus the row's own tail (see reference.py)."""

from accel.kernels.prefix_attention.reference import Plan, SharedKV, plan, prefix_attention

__all__ = ["Plan", "SharedKV", "plan", "prefix_attention"]
