"""Model-free and model-based guessers of next tokens, imported as ``accel.drafters``."""
