"""The samplers of each study, with their settings.  The plans are written down in docs/quality.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.quality_decode import Sampler, Setting
from bench.quality_distiller import STUDY_LR, ChoiceMemory, DistillerMemory
from bench.quality_memory import KernelMemory, Memory, RidgeMemory
from bench.samplers import Explored, Filter, Plain, by_name
from esamp_core import countdown
from esamp_core.sample import DistillerConfig, SamplingParams

BASE = Filter(min_p=0.05)  # what every exploring sampler and control starts from
BASE_PARAMS = SamplingParams(temperature=1.0, min_p=0.05)


def kernel(gamma: float, window: int) -> Plain:
    def memory(setting: Setting) -> Memory:
        return KernelMemory(setting, gamma, window)

    return Plain(f"kernel {gamma:g}, window {window}", BASE, memory=memory)


def ridge(gamma: float) -> Plain:
    def memory(setting: Setting) -> Memory:
        return RidgeMemory(setting, gamma)

    return Plain(f"ridge {gamma:g}", BASE, memory=memory)


def with_rounds(sampler: Plain, rounds: int) -> Plain:
    return replace(sampler, name=f"{sampler.name}, {rounds} rounds", rounds=rounds)


def with_arithmetic(sampler: Plain) -> Plain:
    return replace(sampler, name=f"{sampler.name}, arithmetic", arithmetic=True)


def esamp(beta: float, name: str | None = None, random: bool = False, **config: Any) -> Plain:
    """Without a gate, and from the plain start with the rate of this study."""
    chosen = DistillerConfig(**({"gate": False, "lr": None if "start" in config else STUDY_LR} | config))

    def memory(setting: Setting) -> Memory:
        return DistillerMemory(setting, beta, chosen, random)

    return Plain(name or f"ESamp {beta:g}", BASE, memory=memory, learns=chosen.lr > 0)


def choice(gamma: float, name: str | None = None, **config: Any) -> Plain:
    chosen = DistillerConfig(target="choice", **({"lr": STUDY_LR} | config))

    def memory(setting: Setting) -> Memory:
        return ChoiceMemory(setting, gamma, chosen)

    return Plain(name or f"choice {gamma:g}", BASE, memory=memory)


def calibrated(beta: float, lr: float) -> Plain:
    """ESamp from the embedded model's shipped start weights; another model has its own."""
    return esamp(beta, f"ESamp {beta:g}, calibrated", start=str(countdown.DISTILLER), lr=lr)


def independent() -> list[Sampler]:
    """Samplers without a memory: what one would try first, and the control that explains sharpening away."""
    return [
        Plain("vanilla", Filter()),
        *(Plain(f"T {t:g}", Filter(temperature=t)) for t in (0.6, 0.8, 1.2, 1.5)),
        Plain("top-p .9", Filter(top_p=0.9)),
        Plain("min-p .05", BASE),
        *(Plain(f"T {t:g}, min-p", hot(t)) for t in (1.2, 1.5)),
        Plain("FIRE 4", Filter(first_temperature=4.0)),
        Plain("top-n-sigma 1", Filter(top_n_sigma=1.0)),
        Plain("control: sharpened x 1.25", replace(BASE, sharpen=1.25)),
    ]


def main(own_start: bool = True) -> list[Sampler]:
    """The main table, in its order.  own_start: whether the embedded model's start weights fit the model."""
    memory = with_rounds(kernel(2.0, 1024), 4)
    return [
        *independent(),
        esamp(0.25, "control: untrained Distiller", lr=0.0),
        esamp(0.25, "control: random direction", random=True),
        *(esamp(beta) for beta in (0.1, 0.25, 0.5)),
        *([calibrated(0.25, 0.03)] if own_start else []),
        Plain("arithmetic", BASE, arithmetic=True),
        choice(2.0),
        with_arithmetic(choice(2.0)),
        with_rounds(ridge(2.0), 4),
        kernel(2.0, 1024),
        memory,
        with_arithmetic(memory),
    ]


def hard(own_start: bool = True) -> list[Sampler]:
    """The tables of hard problems: the baselines, ESamp with its controls, and the sibling options."""
    names = (
        *("vanilla", "min-p .05", "T 1.2, min-p", "control: sharpened x 1.25"),
        *("control: untrained Distiller", "control: random direction", "ESamp 0.25", "ESamp 0.25, calibrated"),
        *("arithmetic", "choice 2", "choice 2, arithmetic", "ridge 2, 4 rounds"),
        *("kernel 2, window 1024, 4 rounds", "kernel 2, window 1024, 4 rounds, arithmetic"),
    )
    known = by_name(main(own_start))
    return [known[name] for name in names if name in known]


def options() -> list[str]:
    """The sibling options that the tables decide about."""
    names = [s.name for s in main() if s.dependent]
    return [name for name in names if not name.startswith(("ESamp", "control"))]


def tune() -> list[Sampler]:
    """Settings that the main table must choose; on the tuning pool only."""
    samplers: list[Sampler] = [Plain("vanilla", Filter()), Plain("min-p .05", BASE)]
    samplers += [Plain(f"FIRE {t}", Filter(first_temperature=t)) for t in (4.0, 10.0)]
    samplers += [Plain("arithmetic", BASE, arithmetic=True), with_arithmetic(Plain("T 1.2, min-p", hot(1.2)))]
    for gamma in (1.0, 2.0, 3.0):
        samplers += [kernel(gamma, 4096), ridge(gamma), choice(gamma)]
    samplers += [choice(2.0, f"choice 2, lr {lr}", lr=lr) for lr in (0.03, 0.1)]
    samplers += [kernel(2.0, 256), kernel(2.0, 1024)]
    samplers += [with_rounds(kernel(2.0, 4096), r) for r in (4, 8)]
    samplers += [with_rounds(ridge(2.0), 4), with_rounds(with_arithmetic(kernel(2.0, 4096)), 4)]
    return samplers


def quick() -> list[Sampler]:
    """One of each kind, for `make quality-quick`."""
    return [
        Plain("vanilla", Filter()),
        Plain("min-p .05", BASE),
        Plain("top-n-sigma 1", Filter(top_n_sigma=1.0)),
        Plain("FIRE 4", Filter(first_temperature=4.0)),
        Plain("arithmetic", BASE, arithmetic=True),
        esamp(0.25),
        esamp(0.25, "control: untrained Distiller", lr=0.0),
        esamp(0.25, "control: random direction", random=True),
        Explored("ESamp .25 by Explorer", replace(BASE_PARAMS, beta=0.25), DistillerConfig(gate=False, lr=STUDY_LR)),
        choice(2.0),
        with_arithmetic(with_rounds(kernel(2.0, 1024), 4)),
        ridge(2.0),
    ]


def hot(temperature: float) -> Filter:
    return Filter(temperature=temperature, min_p=0.05)


def studies() -> dict[str, dict[str, Sampler]]:
    """By name; within a study by the sampler's name."""
    lists = {
        "main": main(),
        "other-model": main(own_start=False),
        "hard": hard(),
        "hard-other-model": hard(own_start=False),
        "tune": tune(),
        "quick": quick(),
    }
    return {name: by_name(samplers) for name, samplers in lists.items()}
