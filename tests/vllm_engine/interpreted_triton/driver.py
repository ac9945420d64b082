"""The driver of a device that is the host."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends import driver


class InterpretedDriver(driver.DriverBase):
    def __init__(self) -> None:
        pass  # the base class looks for a compiler of launchers

    @staticmethod
    def is_active() -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no kernel is launched under TRITON_INTERPRET=1")

    map_python_to_cpp_type = get_current_target = get_benchmarker = _unused
