"""esamp_core: Exploratory Sampling (arXiv 2604.24927) with hand-written Triton kernels.

The parallel samples of one prompt explore different ideas.  Import what you need from where it lives:

``esamp_core.sample``    the functional ops and :class:`~esamp_core.sample.Explorer`, for custom decoders
``esamp_core.decoder``   a thin decoder for any decoder-only transformers model
``esamp_core.reference`` every op again in plain PyTorch: the truth in tests, and the CPU path
"""

__version__ = "0.1.0"
