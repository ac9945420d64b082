"""The compiler that is never used."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing is compiled under TRITON_INTERPRET=1")


class InterpretedBackend(BaseBackend):
    supports_target = staticmethod(lambda target: False)
    hash = parse_options = add_stages = load_dialects = get_module_map = _unused
