"""Calibration: raw statistics of a float graph on sample data (`observe`), and ranges from them (`thresholds`)."""
