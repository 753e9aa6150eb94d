"""Calibration data: samples of texts and drawn scenes, and the batches that they are laid out in."""
