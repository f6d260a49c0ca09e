"""Compact networks to distill into, one a file, each as the tables of its paper say; smaller by a factor on its widths.

All take the same arguments: ``classes``; ``width``, which channels are multiplied by; ``small``, for images of about 32
x 32: the first two places that halve the image do not; and ``inputs``, the channels of the image. All begin untrained.
"""
