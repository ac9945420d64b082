"""Configuration: small frozen dataclasses, checked when they are made, and the options of a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch

from esamp_core.base.checks import is_int, is_real, require

FilterOrder = Literal["transformers", "vllm"]
FILTER_ORDERS: tuple[FilterOrder, ...] = ("transformers", "vllm")
Apply = Literal["candidates", "latent"]
Recipe = Literal["default", "paper", "release"]

# Below this, logits / temperature loses its meaning in float32; 0 means greedy and is exact.
MIN_TEMPERATURE = 1e-3
# Anything larger is a mistake, and products with it could leave float32.
LARGEST = 1e6


def check_options(filter_order: str, max_candidates: int) -> None:
    require(filter_order in FILTER_ORDERS, "filter_order", f"be one of {FILTER_ORDERS}", filter_order)
    ok = is_int(max_candidates) and 1 <= max_candidates <= 1024
    require(ok, "max_candidates", "be an integer in 1..1024", max_candidates)


def check_apply(apply: str, target: str, neutral: bool) -> None:
    """apply: the form of exploration.  target: what the Distillers learn.  neutral: of candidates only."""
    require(apply in ("candidates", "latent"), "apply", 'be "candidates" or "latent"', apply)
    ok = apply == "candidates" or target == "deep"
    require(ok, "config.target", 'be "deep" with apply="latent"', target)
    require(isinstance(neutral, bool), "neutral", "be True or False", neutral)
    require(not (neutral and apply == "latent"), "neutral", 'be False with apply="latent"', neutral)


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled.

    temperature: divides the reweighted logits; 0 is argmax, otherwise in [1e-3, 1e6]. Default 1.
    top_k: keep the k most likely tokens and all ties with the k-th; 0 is off (default).
    top_p: keep the smallest set of most likely tokens with this much probability, in [1e-6, 1]; 1 is off (default).
    min_p: keep tokens with at least this fraction of the largest probability, in [0, 1]; 0 is off (default).
    beta: strength of exploration, ``new = logit + beta * novelty``; 0 is exactly vanilla sampling. Default
        0.1, the largest that lost nothing on models that could be tried (docs/quality.md); the paper's best on AIME25
        is 0.25. With ``DistillerConfig(target="choice")`` it is that rule's gamma.
    seed: request seed, any 64-bit integer; None (default) draws a fresh one whenever rows are opened.
    stratified: siblings opened together divide every distribution evenly among them (arithmetic sampling, Vilnis et
        al. 2023, arXiv 2210.15458): a beginning of probability p is drawn floor(n p) or ceil(n p) times by n siblings
        of equal parameters. Each sample alone keeps its distribution. Default False: independent draws.
    distinct: siblings opened together are drawn without replacement (stochastic beam search, Kool et al. 2019, arXiv
        1903.06059): no two of them draw the same tokens. The first is an ordinary sample, the others are what is left.
        Rows then change places, so whoever owns the cache must follow (``Explorer.branch``). Default None: True for
        the samples of a prompt in ``generate``, False in an Explorer and inside other engines.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    beta: float = 0.1
    seed: int | None = None
    stratified: bool = False
    distinct: bool | None = None

    def __post_init__(self) -> None:
        t = self.temperature
        ok_temperature = is_real(t) and (t == 0 or MIN_TEMPERATURE <= t <= LARGEST)
        require(ok_temperature, "temperature", f"be 0 or in [{MIN_TEMPERATURE}, {LARGEST:g}]", t)
        require(is_int(self.top_k) and 0 <= self.top_k < 2**31, "top_k", "be an integer >= 0 (0 is off)", self.top_k)
        require(is_real(self.top_p) and 1e-6 <= self.top_p <= 1, "top_p", "be in [1e-6, 1] (1 is off)", self.top_p)
        require(is_real(self.min_p) and 0 <= self.min_p <= 1, "min_p", "be in [0, 1] (0 is off)", self.min_p)
        require(is_real(self.beta) and abs(self.beta) <= LARGEST, "beta", f"be a number in +-{LARGEST:g}", self.beta)
        ok_seed = self.seed is None or (is_int(self.seed) and -(2**63) <= self.seed < 2**64)
        require(ok_seed, "seed", "be None or a 64-bit integer", self.seed)
        require(isinstance(self.stratified, bool), "stratified", "be True or False", self.stratified)
        ok_distinct = self.distinct is None or isinstance(self.distinct, bool)
        require(ok_distinct, "distinct", "be True, False or None", self.distinct)
        excluded = "be None or False with temperature 0 and with stratified"
        require(not (self.distinct and (t == 0 or self.stratified)), "distinct", excluded, self.distinct)


class OptionalRate:
    """The field ``lr`` of a DistillerConfig: given as a number or None, read as a number.

    Kept under another name: when torch.compile traces a read of ``vars(config)["lr"]``, it calls ``__get__`` again.
    """

    @overload
    def __get__(self, config: None, owner: type) -> None: ...  # the default, for dataclass

    @overload
    def __get__(self, config: DistillerConfig, owner: type) -> float: ...

    def __get__(self, config: DistillerConfig | None, owner: type) -> float | None:
        if config is None:
            return None
        given: float | None = vars(config)["_lr"]
        if given is not None:
            return given
        return {"default": 0.1 if config.start is None else 0.03, "paper": 4e-4, "release": 1e-3}[config.recipe]

    def __set__(self, config: DistillerConfig, value: float | None) -> None:
        vars(config)["_lr"] = value


@dataclass(frozen=True)
class DistillerConfig:
    """The Distiller and its learning rule (see ``reference.distiller_step_`` for the formulas).

    rank: r, width of the gated bottleneck. Default 64.
    lr: scale-free rate; one step moves the prediction by about this fraction of its error. 0 freezes. Default (None)
        0.1, and 0.03 with ``start``: on a real model 0.3 overshoots in the first tens of steps, and what calibration
        found, 0.1 already destroys (docs/quality.md has the tables). Of a published recipe, its own.
    momentum: 0 (default) is plain SGD; above 0 costs one more buffer of the size of the weights, in float32.
    clip: bound on the rms over H of a row's error gradient, in units of the deep state's scale. Default 1.
    target: "deep" learns the deep hidden state (the paper); "choice" learns which tokens siblings draw.
    weight_dtype: torch.float32 (default) or torch.bfloat16, then updated with stochastic rounding.
    gate: scale each row's beta by how much better than a constant its Distiller has predicted so far, 0 while it has
        not (``gauge_``; default). False explores at once, with whatever the Distiller says. Only with target "deep".
    seed: seed of the start weights, the same for every group. Default 0.
    deep_scale: s, the rms of the deep hidden state; None (default) measures it on the first learned batch.
    patience: warn when a group's loss has not fallen after this many updates. Default 256.
    start: file of start weights for this model and rank, written by ``esamp calibrate``; None (default) starts every
        group at the identity path. Only with target "deep".
    recipe: network and learning rule. "default" is the one that all of the above is about; "paper" and "release" are
        two that were published, kept for comparison (``PRESETS`` has them whole). They run in plain PyTorch on every
        device, learn the mean squared error in their own way, and know of rank, lr and seed alone.
    """

    rank: int = 64
    lr: OptionalRate = OptionalRate()
    momentum: float = 0.0
    clip: float = 1.0
    target: Literal["deep", "choice"] = "deep"
    weight_dtype: torch.dtype = torch.float32
    gate: bool = True
    seed: int = 0
    deep_scale: float | None = None
    patience: int = 256
    start: str | None = None
    recipe: Recipe = "default"

    def __post_init__(self) -> None:
        recipes = ("default", "paper", "release")
        require(self.recipe in recipes, "recipe", f"be one of {', '.join(recipes)}", self.recipe)
        require(is_int(self.rank) and 1 <= self.rank <= 1024, "rank", "be an integer in 1..1024", self.rank)
        require(is_real(self.lr) and self.lr >= 0, "lr", "be a finite number >= 0 (0 freezes)", self.lr)
        require(is_real(self.momentum) and 0 <= self.momentum < 1, "momentum", "be in [0, 1)", self.momentum)
        require(is_real(self.clip) and self.clip > 0, "clip", "be a finite number > 0", self.clip)
        require(self.target in ("deep", "choice"), "target", 'be "deep" or "choice"', self.target)
        dtypes = (torch.float32, torch.bfloat16)
        require(self.weight_dtype in dtypes, "weight_dtype", "be torch.float32 or torch.bfloat16", self.weight_dtype)
        require(isinstance(self.gate, bool), "gate", "be True or False", self.gate)
        require(is_int(self.seed) and 0 <= self.seed < 2**63, "seed", "be an integer in 0..2^63-1", self.seed)
        ok_scale = self.deep_scale is None or (is_real(self.deep_scale) and self.deep_scale > 0)
        require(ok_scale, "deep_scale", "be None or a finite number > 0", self.deep_scale)
        require(is_int(self.patience) and self.patience >= 1, "patience", "be an integer >= 1", self.patience)
        ok_start = self.start is None or (isinstance(self.start, str) and self.target == "deep")
        require(ok_start, "start", 'be None or a path as text, with target "deep"', self.start)
        if self.published:
            needed = {"target": "deep", "gate": False, "momentum": 0, "weight_dtype": torch.float32, "start": None}
            for name, value in needed.items():
                got = getattr(self, name)
                require(got == value, name, f"be {value!r} with recipe={self.recipe!r}", got)

    @property
    def published(self) -> bool:
        """Whether the recipe is one of others, whose steps are plain PyTorch."""
        return self.recipe != "default"

    @property
    def gated(self) -> bool:
        """Whether Distillers are compared with a constant."""
        return self.gate and self.target == "deep"
