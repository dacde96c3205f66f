"""Faster language-model inference with artifacts distilled for your model."""
