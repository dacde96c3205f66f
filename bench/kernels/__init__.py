"""Speed of the kernel families through their public functions, beside the floors that the machine itself sets.

``suite.run`` measures on one device: the machine's ceilings first, then case by case the check against the family's
reference, the time, the peers. Knows no model and nothing of how a family works inside.
"""
