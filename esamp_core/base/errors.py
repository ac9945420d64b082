"""The exceptions of the library.  Every message names the argument and shows what was received."""


class EsampError(Exception):
    """Base class of all errors raised by esamp_core."""


class ArgumentError(EsampError, ValueError):
    """An argument has the wrong shape, dtype, device or range."""


class CapacityError(EsampError, RuntimeError):
    """Every Distiller slot is leased, or more rows are open than ``max_rows``."""


class StateError(EsampError, RuntimeError):
    """The verbs were called in an order that would silently lose exploration or learning.

    Raised for a closed or outdated :class:`~esamp_core.sample.Rows`, a ``sample`` without ``predict``,
    a ``predict`` without the ``learn`` of the step before, and the like.
    """


class EncodingError(ArgumentError):
    """A prompt that the tokenizer cannot encode."""


class UnsupportedModelError(EsampError, TypeError):
    """The model's architecture, or a feature asked of it, is not supported; the message says which and why."""
