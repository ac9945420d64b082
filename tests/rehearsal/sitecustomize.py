"""A process that finds this folder on PYTHONPATH has a simulated CUDA device, from the moment torch is imported."""

import importlib.abc
import importlib.machinery
import sys
from typing import Any


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Lets torch be found as ever, and installs the device once it has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_install(module: Any) -> None:
            load(module)
            from tests.simulated_cuda import install

            install()

        spec.loader.exec_module = load_and_install  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterTorch())
