"""What a program takes on the device, and whether that fits.

The code sizes are those of the kernels in ``device/`` compiled by arm-none-eabi-gcc 12.2, ``-O2 -mcpu=cortex-m4
-mthumb``, the larger of the two rounding rules; another compiler or another level differs by some percent of a few KB.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from deploykit.core.errors import DeploykitError
from deploykit.core.figures import file_size
from deploykit.exporters.c99.coded import DECODE_BYTES, DECODER_BYTES
from deploykit.exporters.c99.memory import Plan
from deploykit.exporters.c99.options import Options
from deploykit.exporters.c99.program import Operation, Product, Program, constants, reads

KERNEL_BYTES = {
    "Conv": 532, "ConvTranspose": 550, "Dense": 268, "Add": 614, "Multiply": 384, "MaxPool": 264, "AveragePool": 340,
    "Mean": 236, "Table": 104, "Softmax": 222, "Concat": 178, "Pad": 198, "Slice": 178, "Transpose": 178, "Resize": 114,
}  # fmt: skip
"""Code of each operation's kernel."""
DEPTHWISE_BYTES = 462
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
    coded: int
    """Of the constants, those that are coded weights."""
    decoded: int
    """What these weights take decoded, all together."""
    largest: int
    """And the largest of them, which the arena has room for; 0: there are none."""

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
    distinct = {(a.dtype.str, a.tobytes()) for op in program.operations for a in constants(program, op)}
    size = sum(len(data) for _, data in distinct)
    coded = {data.tobytes(): op.weights.nbytes for op, data in program.coded.items()}
    weights = sum(map(len, coded)), sum(coded.values()), max(coded.values(), default=0)
    if synthesis:
        return Footprint(size, 0, plan.bytes, 0, *weights)
    kinds = {"Depthwise" if getattr(op, "depthwise", False) else type(op).__name__ for op in program.operations}
    kernels = sum(DEPTHWISE_BYTES if kind == "Depthwise" else KERNEL_BYTES[kind] for kind in kinds)
    calls = len(program.operations) * (CALL_BYTES + STRUCTURE_BYTES)
    decoding = DECODER_BYTES + len(program.coded) * DECODE_BYTES if program.coded else 0
    return Footprint(size, kernels + calls + decoding, plan.bytes, STACK_BYTES, *weights)


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
            sizes[op.layer] += sum(a.nbytes for a in constants(program, op))
        layer, most = sizes.most_common(1)[0]
        complaints.append(
            f"flash: {file_size(found.flash)} of {file_size(flash)}, {file_size(found.flash - flash)} too much. Layer "
            f"{layer} needs most, {file_size(most)}. A network with fewer channels there helps"
        )
    if ram is not None and found.ram > ram:
        plainly = ', and so does weights = "plain"' if program.coded else ""
        complaints.append(
            f"RAM: {file_size(found.ram)} of {file_size(ram)}, {file_size(found.ram - ram)} too much. Layer "
            f"{plan.fullest.layer} needs most, {_alive(program, plan.fullest)}. A smaller input image, an "
            f"earlier stride or fewer channels there help{plainly}"
        )
    if complaints:
        listed = "\n  ".join(complaints)
        raise DeploykitError(
            f"this model does not fit target '{target}':\n  {listed}\n"
            f"If your board has more, copy the target's TOML, raise the figures under [options] and give the file."
        )
    return found


def _alive(program: Program, operation: Operation) -> str:
    read = sum(t.size for t in reads(operation) if t.data is None)
    said = f"{file_size(read)} in and {file_size(operation.y.size)} out"
    if isinstance(operation, Product) and operation in program.coded:
        said += f", {file_size(operation.weights.nbytes)} of decoded weights"
    return said
