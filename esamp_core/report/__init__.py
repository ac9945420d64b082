"""What a run gave: estimators for many samples per problem, run files, and the page that shows one."""

from esamp_core.report.html_page import page, run_report
from esamp_core.report.run_file import (
    ESTIMATED_KL,
    EXACT_KL,
    Curve,
    PromptSamples,
    RunFile,
    SampleText,
    StepSeries,
)

__all__ = [
    "ESTIMATED_KL",
    "EXACT_KL",
    "Curve",
    "PromptSamples",
    "RunFile",
    "SampleText",
    "StepSeries",
    "page",
    "run_report",
]
