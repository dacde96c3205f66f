"""Kernel families, imported as ``accel.kernels``. Imports nothing of accel.

The folder shares its bare name with Hugging Face's kernel hub client. With the repository root on ``sys.path``
(``python -c``, ``python -m``) ``import kernels`` finds this file first; it then steps aside for the real package.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p).resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
