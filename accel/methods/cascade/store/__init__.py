"""Demonstrations kept in a file, and found again a step at a time."""

from accel.methods.cascade.store.demonstration import Demonstration, Step
from accel.methods.cascade.store.store import Added, DemonstrationStore, Found, Situation

__all__ = ["Added", "Demonstration", "DemonstrationStore", "Found", "Situation", "Step"]
