"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST: pruned in rounds, values shared and trained, coded.

Every network is trained here, exported by its recipe, and its .dkz unpacked again; what counts is every byte of that
.dkz and the error of the file that comes out of it, in ONNX Runtime, on the 10,000 test images.

    python -m benchmarks.lenets
"""

from __future__ import annotations

COMMAND = "python -m benchmarks.lenets"
EPOCH = 600
"""Steps of 100 images."""
SEEDS = (0, 1, 2)
