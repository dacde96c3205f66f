"""Workloads, runners, metrics and reports, imported as ``accel.bench``. Uses only public names of accel."""
