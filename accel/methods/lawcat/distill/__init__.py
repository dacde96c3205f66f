"""Making conversions: attention transfer, then tuning (README.md of the method)."""
