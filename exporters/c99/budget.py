"""What a program takes on the device, and whether that fits.

The code sizes are those of the kernels in ``device/`` compiled by arm-none-eabi-gcc 12.2, ``-O2 -mcpu=cortex-m4
-mthumb``, the larger of the two rounding rules; another compiler or another level differs by some percent of a few KB.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from deploykit.core.errors import DeploykitError
from deploykit.core.figures import file_size
from deploykit.exporters.c99.memory import Plan
from deploykit.exporters.c99.options import Options
from deploykit.exporters.c99.program import Operation, Program, constants, reads

KERNEL_BYTES = {
    "Conv": 526, "ConvTranspose": 550, "Dense": 260, "Add": 614, "Multiply": 384, "MaxPool": 264, "AveragePool": 340,
    "Mean": 236, "Table": 104, "Softmax": 222, "Concat": 178, "Pad": 198, "Slice": 178, "Transpose": 178, "Resize": 114,
}  # fmt: skip
"""Code of each operation's kernel."""
DEPTHWISE_BYTES = 476
CALL_BYTES = 24
"""Code of one call in model_run."""
STRUCTURE_BYTES = 96
"""Sizes and pointers of one operation, about."""
STACK_BYTES = 256
"""Deepest stack of any kernel and model_run; the compiler reports up to 120 for a kernel on Cortex-M4."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device."""

    constants: int
    """Weights, biases, multipliers, tables."""
    code: int
    arena: int
    stack: int

    @property
    def flash(self) -> int:
        """Read-only memory."""
        return self.constants + self.code

    @property
    def ram(self) -> int:
        """Arena, inputs and outputs included, and stack."""
        return self.arena + self.stack


def footprint(program: Program, plan: Plan, synthesis: bool) -> Footprint:
    """What a program takes; equal arrays are stored once. Logic has neither code nor a stack."""
    distinct = {(a.dtype.str, a.tobytes()) for op in program.operations for _, a in constants(op)}
    size = sum(len(data) for _, data in distinct)
    if synthesis:
        return Footprint(size, 0, plan.bytes, 0)
    kinds = {"Depthwise" if getattr(op, "depthwise", False) else type(op).__name__ for op in program.operations}
    kernels = sum(DEPTHWISE_BYTES if kind == "Depthwise" else KERNEL_BYTES[kind] for kind in kinds)
    calls = len(program.operations) * (CALL_BYTES + STRUCTURE_BYTES)
    return Footprint(size, kernels + calls, plan.bytes, STACK_BYTES)


def require_fit(program: Program, plan: Plan, settings: Options, target: str) -> Footprint:
    """The footprint, if it is within the target's budgets.

    Raises:
        DeploykitError: it is not; names the layer that needs most, by how much it is too large, and what would help.
    """
    found = footprint(program, plan, settings.synthesis)
    flash, ram = settings.flash_bytes, settings.ram_bytes
    complaints = []
    if flash is not None and found.flash > flash:
        sizes = Counter[str]()
        for op in program.operations:
            sizes[op.layer] += sum(a.nbytes for _, a in constants(op))
        layer, most = sizes.most_common(1)[0]
        complaints.append(
            f"flash: {file_size(found.flash)} of {file_size(flash)}, {file_size(found.flash - flash)} too much. Layer "
            f"{layer} needs most, {file_size(most)}. A network with fewer channels there helps"
        )
    if ram is not None and found.ram > ram:
        complaints.append(
            f"RAM: {file_size(found.ram)} of {file_size(ram)}, {file_size(found.ram - ram)} too much. Layer "
            f"{plan.fullest.layer} needs most, {_alive(plan.fullest)}. A smaller input image, an earlier stride or "
            "fewer channels there help"
        )
    if complaints:
        listed = "\n  ".join(complaints)
        raise DeploykitError(
            f"this model does not fit target '{target}':\n  {listed}\n"
            f"If your board has more, copy the target's TOML, raise the figures under [options] and give the file."
        )
    return found


def _alive(operation: Operation) -> str:
    read = sum(t.size for t in reads(operation) if t.data is None)
    return f"{file_size(read)} in and {file_size(operation.y.size)} out"
