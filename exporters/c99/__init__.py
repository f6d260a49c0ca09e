"""The c99 exporter's parts: the hub becomes a program of integer operations, which numpy runs and C spells out.

`lower` makes the `program`; `execute` runs it exactly (the oracle); `emit` writes it as C beside the kernels of
``device/``. Another back end for integers (an RTL generator, QONNX, vendor kernels) starts from the same program.
"""
