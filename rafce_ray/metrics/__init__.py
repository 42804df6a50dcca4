"""Figures of predictions: counts, intervals, calibration, comparison, drift."""
