"""Making masked-diffusion models: from a causal model (a2d), certain in few steps (dparallel), with a threshold that
keeps their accuracy (calibrate)."""
