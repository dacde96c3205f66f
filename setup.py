"""Maps three top-level folders into the accel package; everything else is in pyproject.toml.

`kernels` is also the name of Hugging Face's kernel hub client, which transformers imports when it is installed,
so the folder must never be importable under its bare name: it is `accel.kernels`, and so on.
"""

from setuptools import find_packages, setup

MAPPED = {"accel.kernels": "kernels", "accel.drafters": "drafters", "accel.bench": "bench"}

# a set: the links that `make setup` lays for type checkers show the mapped folders a second time
packages = set(find_packages(include=["accel", "accel.*"]))
for name, folder in MAPPED.items():
    packages |= {name, *(f"{name}.{sub}" for sub in find_packages(folder))}

setup(packages=sorted(packages), package_dir=MAPPED)
