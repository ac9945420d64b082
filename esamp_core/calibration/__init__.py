"""Calibration: start weights for a model's Distillers, fitted once on the model's own samples."""

from esamp_core.calibration.config import CalibrationConfig
from esamp_core.calibration.fit import Calibration
from esamp_core.calibration.pipeline import calibrate, save_start

__all__ = ["Calibration", "CalibrationConfig", "calibrate", "save_start"]
