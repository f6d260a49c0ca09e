"""Benchmark: the files of one or more artifacts, each in its own runtime, taking turns in one run.

Taking turns matters more than the number of runs: whatever else the machine does then meets all files alike, and two
files can be compared round by round although the machine is not quiet.
"""

from deploykit.bench.compare import Benchmark, Ratio, Timing
from deploykit.bench.drift import Drift
from deploykit.bench.there import measure_there
from deploykit.bench.timing import measure, measure_artifact

__all__ = ["Benchmark", "Drift", "Ratio", "Timing", "measure", "measure_artifact", "measure_there"]
