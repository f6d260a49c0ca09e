"""``deploykit explain``: why every operator of an artifact is integer, float or slow, and what would be better.

What the artifact knows is said from the artifact alone. With its sample data the hub is made again, and then everything
is measured that can be: what each operator contributes to the error of the answers, how many samples are enough, and
what other thresholds, corrections and layers in float would bring.
"""

from deploykit.explain.entry import explain

__all__ = ["explain"]
