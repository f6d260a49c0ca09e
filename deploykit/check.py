"""Checks: is the file what the hub says (operator by operator, in its own runtime), and is the hub still the model?

End to end, rounding ties grow from layer to layer even between two correct kernels, so integers are compared one
operator at a time with forced inputs; whole networks are compared by what they answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.core.artifact import Check, File, Runner
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import OperatorError, Score
from deploykit.core.precision import Precision, is_integer, is_quantized
from deploykit.core.progress import track
from deploykit.core.request import MAX_DROP
from deploykit.core.request import Gate as Gate
from deploykit.core.target import Target
from deploykit.core.user_code import call
from deploykit.exporters import Exporter, max_lsb, max_mismatch, to_onnx
from deploykit.hub.graph import Decision, FloatGraph, Hub
from deploykit.hub.operators import PRODUCTS
from deploykit.hub.running import exposing, lean_session, session
from deploykit.hub.slices import OperatorSlice, operator_slices

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

BATCH = 16
TIE = 1 / 32
"""Of a step: so near to a tie, kernels may round either way. Those that round twice (TFLM) are off by up to 2^-(s+1)
behind a shift of s bits, 4 and more in products; those that round half up differ from half to even on ties themselves.
"""
BORDER_DB = 30.0
"""Folding with the right padding leaves 35 dB and more; a border padded with black leaves 20."""
ENOUGH_DB = {"fp32": 60.0, "fp16": 30.0}
"""Signal to noise that is right for a file of that precision, answering again or elsewhere."""
ENOUGH_INT8_DB = 15.0
LOST = "lost accuracy (points)"
Metric = Callable[[Mapping[str, "NDArray[Any]"], "NDArray[Any] | None"], float]
"""``metric(outputs, labels) -> percent``, higher is better."""


def check_operators(
    hub: Hub,
    exporter: Exporter,
    target: Target,
    data: DataSet,
    gate: Gate,
    precision: Precision = "int8",
    samples: int = 2,
) -> tuple[tuple[Check, ...], tuple[OperatorError, ...]]:
    """Writes every integer operator as a file of its own, runs it in its runtime and compares it with the hub.

    The inputs are what the hub computes on real samples, without any optimizer. They lie on the integer grid, so the
    file's operator sees exactly the same integers.

    Args:
        hub: that the file was written from.
        exporter: of the target.
        target: that the file is for.
        data: where the samples come from.
        gate: the bounds.
        precision: of the file.
        samples: how many, where the hub takes any number at once.

    Returns:
        The checks, and the errors of all operators, those that lose most by being quantized first.
    """
    if hub.spec.grid == "float8":
        detail = "products in 8-bit floating point write floats, which have no LSB; files are compared end to end"
        return (Check("operators", precision, None, gate.max_lsb, None, detail),), ()
    slices = list(operator_slices(hub)) if hub.spec.placement != "weights" else []
    if not slices:
        detail = "this placement keeps operator outputs in float; files are compared end to end"
        return (Check("operators", precision, None, gate.max_lsb, None, detail),), ()
    samples = hub.graph.batch or samples
    values = _reference_values(hub, slices, data, samples)
    floats = _float_values(hub, slices, data, samples)
    with tempfile.TemporaryDirectory() as folder:
        errors = [
            _operator_error(piece, hub, exporter, target, values, floats, Path(folder), precision)
            for piece in track(slices, "checking operators")
        ]
    errors.sort(key=lambda e: e.sqnr_db)
    by_design = max_lsb(exporter, target, hub)
    lsb_bound = max(gate.max_lsb, by_design) if by_design else gate.max_lsb
    worst_lsb = max(errors, key=lambda e: np.inf if np.isnan(e.lsb) else e.lsb)
    products = [e for e in errors if e.operator in PRODUCTS]
    checks = [
        Check(
            "operators: largest difference (LSB)", precision, worst_lsb.lsb, lsb_bound,
            worst_lsb.lsb <= lsb_bound + 0.01,
            f"{worst_lsb.operator} {worst_lsb.layer}; {len(errors)} operators{_coverage(hub, len(products))}",
        )
    ]  # fmt: skip
    if products:
        worst = max(products, key=lambda e: e.mismatch)
        bound = max(gate.max_mismatch, max_mismatch(exporter, target, hub))
        checks.append(
            Check(
                "operators: differing outputs (%)", precision, worst.mismatch, bound,
                worst.mismatch <= bound, f"{worst.operator} {worst.layer}; {len(products)} products",
            )
        )  # fmt: skip
    return tuple(checks), tuple(errors)


def _coverage(hub: Hub, compared: int) -> str:
    """How many of the integer products were compared one by one, and why the others could not be."""
    integer = sum(d.quantized and d.operator in PRODUCTS for d in hub.decisions)
    if not integer:
        return ""
    why = ": the others write floats, or tensors that do not begin with the batch" if compared < integer else ""
    return f", {compared} of {integer} integer products among them{why}"


def _reference_values(
    hub: Hub, slices: Sequence[OperatorSlice], data: DataSet, samples: int
) -> dict[str, NDArray[Any]]:
    """All slices' inputs and outputs as the hub computes them, float Q/DQ node by node."""
    model = onnx.load_model_from_string(hub.bytes)
    inputs = {i.name for i in model.graph.input}
    # what a slice reads is a float value before its Q; what the integers stand for is the value behind its DQ
    behind: dict[str, str] = {}
    dequantized = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in dequantized:
            behind.setdefault(node.input[0], dequantized[node.output[0]])
    wanted = {name for s in slices for name in s.inputs}
    names = sorted({behind.get(n, n) for n in wanted} | {s.output for s in slices})
    inner = [n for n in names if n not in inputs]
    held = {o.name for o in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in inner if n not in held
    )
    batch = next(data.batches(samples))
    feed = {n: a for n, a in batch.inputs.items() if n in inputs}
    values = feed | dict(zip(inner, session(model, optimize=False).run(inner, feed), strict=True))
    return values | {n: values[behind[n]] for n in wanted if n in behind}


def _float_values(hub: Hub, slices: Sequence[OperatorSlice], data: DataSet, samples: int) -> dict[str, NDArray[Any]]:
    """The float network's values of the tensors that the slices read and write."""
    graph = hub.graph.model.graph
    known = {v.name for v in graph.inputs} | {v.name for node in graph for v in node.outputs}
    wanted = sorted({name for s in slices for name in (*s.inputs, s.tensor)} & known)
    return exposing(hub.graph.model, wanted)(next(data.batches(samples)).inputs)


def _operator_error(
    piece: OperatorSlice,
    hub: Hub,
    exporter: Exporter,
    target: Target,
    values: Mapping[str, NDArray[Any]],
    floats: Mapping[str, NDArray[Any]],
    folder: Path,
    precision: Precision,
) -> OperatorError:
    model = ir.from_proto(piece.model)
    alone = Hub(
        FloatGraph(model), hub.spec, model, hub.ranges, (Decision(piece.operator, piece.layer, True),), hub.weights,
        hub.bits,
    )  # fmt: skip
    (file,) = exporter.export({precision: alone}, target, folder)
    outputs = exporter.load(folder / file.path, 1)({name: values[name] for name in piece.inputs})
    difference = np.abs(next(iter(outputs.values())) - values[piece.output]) / piece.scale
    mismatch = ~(difference <= 0.25) & (_distance_to_tie(piece, values) > TIE)
    # an input behind a change of scale is no tensor of the float network; its value in the hub stands in
    (alone_output,) = session(piece.model, optimize=False).run(
        [piece.output], {name: floats.get(name, values[name]) for name in piece.inputs}
    )
    return OperatorError(
        piece.layer, piece.operator, float(difference.max()), 100.0 * float(mismatch.mean()),
        sqnr_db(floats[piece.tensor], alone_output), precision,
    )  # fmt: skip


def _distance_to_tie(piece: OperatorSlice, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """How far the hub's results lie from the middle between two integers before they are rounded, in steps."""
    model = onnx.ModelProto()
    model.CopyFrom(piece.model)
    writer = {output: node for node in model.graph.node for output in node.output}
    quantizer = writer[writer[piece.output].input[0]]
    model.graph.output.append(onnx.helper.make_tensor_value_info(quantizer.input[0], onnx.TensorProto.FLOAT, None))
    feed = {name: values[name] for name in piece.inputs}
    (unrounded,) = session(model, optimize=False).run([quantizer.input[0]], feed)
    steps = unrounded.astype(np.float64) / piece.scale
    distance: NDArray[np.float64] = np.abs(steps - np.floor(steps) - 0.5)
    return distance


@dataclass(frozen=True)
class Answers:
    """A file's outputs on a data set, by output name, and the labels."""

    outputs: dict[str, NDArray[Any]]
    labels: NDArray[Any] | None


def answer(run: Runner, data: DataSet, what: str) -> Answers:
    """Runs all of the data through a file."""
    found: list[dict[str, NDArray[Any]]] = []
    for batch in track(data.batches(BATCH), what, total=-(-len(data) // BATCH)):
        found.append(run(batch.inputs))
    return Answers({name: np.concatenate([f[name] for f in found]) for name in found[0]}, data.labels)


def score(answers: Answers, reference: Answers, precision: str, data: str, metric: Metric | None = None) -> Score:
    """Compares a file's answers with the labels and with the reference's answers.

    The first output counts as class scores if it has two axes and more than one column.
    """
    logits = class_scores(answers.outputs)
    expected = class_scores(reference.outputs)
    labels = answers.labels
    value = cross_entropy = agreement = saturated = None
    if logits is not None and expected is not None:
        agreement = 100.0 * float((logits.argmax(1) == expected.argmax(1)).mean())
        if labels is not None and metric is None:  # what a metric reads may be no class numbers
            value = 100.0 * float((logits.argmax(1) == labels).mean())
            cross_entropy = _cross_entropy(logits, labels)
        top = logits.max(axis=1)
        saturated = 100.0 * float((np.sort(logits, axis=1)[:, -2] == top).mean())
    if metric is not None:
        value = _measured(metric, answers)
    known = reference.outputs  # what a step added (early exits) the original does not answer
    sqnr = {name: sqnr_db(known[name], array) for name, array in answers.outputs.items() if name in known}
    count = len(next(iter(answers.outputs.values())))
    return Score(precision, count, data, value, agreement, cross_entropy, sqnr, saturated)


def doubts(original: Answers) -> list[str]:
    """What the original model's own answers say against it: no better than chance means wrong weights or wrong data."""
    scores = class_scores(original.outputs)
    if scores is None or original.labels is None:
        return []
    right, chance = float((scores.argmax(1) == original.labels).mean()), 1.0 / scores.shape[1]
    if right > chance + 2 * float(np.sqrt(chance * (1 - chance) / len(scores))):  # two standard errors
        return []
    return [
        f"the original model is right on {100 * right:.1f} % of {len(scores)} samples, no better than chance: are "
        "these its trained weights (--weights), and is the data prepared as in training (--preprocess)?"
    ]


def _measured(metric: Metric, answers: Answers) -> float:
    value = call("the metric", metric, answers.outputs, answers.labels)
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise DeploykitError(f"the metric returned {type(value).__name__}; a number is expected, in percent") from None
    if not np.isfinite(found):
        raise DeploykitError(f"the metric returned {found}; a number is expected, in percent")
    return found


def class_scores(outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """The first output, if it looks like ``[n, classes]``."""
    first = next(iter(outputs.values()))
    return first if first.ndim == 2 and first.shape[1] > 1 else None


def sqnr_db(signal: NDArray[Any], other: NDArray[Any]) -> float:
    """10 log10(sum signal^2 / sum (signal - other)^2); at most 200 for equal arrays."""
    noise = float(np.square(signal.astype(np.float64) - other).sum())
    power = float(np.square(signal.astype(np.float64)).sum())
    if noise == 0.0:
        return 200.0
    return float(np.clip(10.0 * np.log10(max(power, 1e-300) / noise), -200.0, 200.0))


def _cross_entropy(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    return float((log_sum - shifted[np.arange(len(labels)), labels]).mean())


def check_lowering(graph: FloatGraph, original: torch.nn.Module | Path, example: Mapping[str, NDArray[Any]]) -> Check:
    """The float graph against what it was made from: largest difference of any output, relative to its largest value.

    Args:
        graph: what lowering made.
        original: the PyTorch module, or the user's ``.onnx`` as it is.
        example: inputs of both.

    Raises:
        DeploykitError: the user's file does not run.
    """
    if graph.batch == 1:
        example = {name: array[:1] for name, array in example.items()}
    is_file = isinstance(original, Path)
    ordered = {v.name or "": example[v.name or ""] for v in graph.model.graph.inputs}
    expected = _onnx_outputs(original, example) if isinstance(original, Path) else _torch_outputs(original, ordered)
    outputs = to_onnx.runner(session(graph.model))(example).values()
    differences = []
    for ours, theirs in zip(outputs, expected, strict=True):
        if ours.shape != theirs.shape:
            differences.append(np.inf)
            continue
        wide = theirs.astype(np.float64)
        differences.append(np.abs(ours - wide).max() / max(np.abs(wide).max(), 1e-9))
    worst = float(np.max(differences))  # a NaN anywhere stays a NaN, and fails
    name = f"float graph against the {'ONNX file' if is_file else 'PyTorch model'} (relative)"
    return Check(name, "fp32", worst, 1e-3, worst <= 1e-3, "")


def _torch_outputs(module: torch.nn.Module, example: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    import torch

    tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in example.items()}
    with torch.no_grad():  # an exported program knows its inputs by their order
        found = module(*tensors.values()) if isinstance(module, torch.fx.GraphModule) else module(**tensors)
    if isinstance(found, torch.Tensor):
        return [found.numpy()]
    return [value.numpy() for value in (found.values() if isinstance(found, Mapping) else found)]


def _onnx_outputs(path: Path, example: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    try:
        return list(to_onnx.runner(lean_session(path))(example).values())
    except Exception as error:  # onnxruntime raises a family of exceptions without a common base
        raise DeploykitError(f"{path} fails on the sample inputs: {str(error).splitlines()[0]}") from None


def check_score(found: Score, baseline: Score, gate: Gate, exact: bool = True) -> tuple[Check, ...]:
    """The score of a file against the bounds; ``baseline`` is the original model's on the same samples.

    ``exact``: nothing was compressed, so an fp32 file must answer as the original does.
    """
    checks = []
    if found.agreement is not None:
        bound = relaxed(99.5 if exact and found.precision == "fp32" else gate.min_agreement, found.samples)
        checks.append(
            Check("agrees with the original model (%)", found.precision, found.agreement, bound,
                  found.agreement >= bound, f"{found.samples} samples, {found.data}")
        )  # fmt: skip
    if found.metric is not None and baseline.metric is not None and found.precision != "fp32":
        drop = baseline.metric - found.metric
        changed = found.samples * (1 - found.agreement / 100) if found.agreement is not None else 0.0
        allowed = MAX_DROP if gate.max_drop is None else gate.max_drop
        error = 100 * float(np.sqrt(changed)) / found.samples  # of a difference of paired counts
        bound, wider = allowed + error, f" and one standard error of {error:.2f}" if error else ""
        checks.append(
            Check(LOST, found.precision, drop, bound, drop <= bound,
                  f"{baseline.metric:.2f} -> {found.metric:.2f}, allowed {allowed:g}{wider}; "
                  f"{found.samples} samples, {found.data}")
        )  # fmt: skip
    # class scores are judged by their answers, every other output by its values
    rest = dict(list(found.sqnr_db.items())[0 if found.agreement is None else 1 :])
    if rest:
        worst = _worst(rest)
        bound = ENOUGH_DB.get(found.precision, 10.0) if exact else 10.0
        checks.append(
            Check("signal to noise of the worst output (dB)", found.precision, found.sqnr_db[worst], bound,
                  found.sqnr_db[worst] >= bound, f"output {worst}; {found.samples} samples, {found.data}")
        )  # fmt: skip
    return tuple(checks)


def narrow(checks: Sequence[Check], gate: Gate) -> list[str]:
    """Says aloud where a file lost more accuracy than was asked for, and passes by the standard error alone."""
    allowed = MAX_DROP if gate.max_drop is None else gate.max_drop
    return [
        f"{c.precision} lost {c.value:.2f} points of accuracy, more than {allowed:g}; it passes because one standard "
        f"error of the samples is added to that bound ({c.bound:.2f})"
        for c in checks
        if c.name == LOST and c.passed and c.value is not None and c.bound is not None and c.value > allowed + 1e-6
    ]


def check_border(exact: FloatGraph, folded: FloatGraph, data: DataSet, precision: Precision) -> Check:
    """What folding the preprocessing costs by itself: both float graphs on the same pixels.

    The padding of the first convolutions then stands for one grey value instead of every channel's mean.
    """
    first, second = (answer(to_onnx.runner(session(g.bytes)), data, "border of folded pixels") for g in (exact, folded))
    found = {name: sqnr_db(first.outputs[name], array) for name, array in second.outputs.items()}
    worst = _worst(found)
    return Check(
        "pixels folded into the first layer: signal to border error (dB)", precision, found[worst], BORDER_DB,
        found[worst] >= BORDER_DB, f"output {worst}, in float; {len(data)} samples",
    )  # fmt: skip


def check_file_against_hub(
    answers: Answers, hub_answers: Answers, precision: str, gate: Gate, least_db: float = ENOUGH_INT8_DB,
    ties: bool = True,
) -> tuple[Check, ...]:  # fmt: skip
    """Whether a quantized file answers like the hub it was written from; ``least_db`` bounds all but class scores, and
    those too where activations are not rounded in the hub (``ties`` is False)."""
    ours, theirs = class_scores(answers.outputs), class_scores(hub_answers.outputs)
    checks = []
    rest = list(answers.outputs.items())
    if ours is not None and theirs is not None:
        agreement = 100.0 * float((ours.argmax(1) == theirs.argmax(1)).mean())
        bound = relaxed(gate.min_file_agreement, len(ours))
        checks.append(
            Check("file agrees with the hub (%)", precision, agreement, bound, agreement >= bound,
                  f"{len(ours)} samples")
        )  # fmt: skip
        rest = rest[1:] if ties else rest
    if rest:
        found = {name: sqnr_db(hub_answers.outputs[name], array) for name, array in rest}
        worst = _worst(found)
        checks.append(
            Check(
                "file against hub (dB)", precision, found[worst], least_db, found[worst] >= least_db, f"output {worst}"
            )
        )
    return tuple(checks)


def _worst(sqnr: Mapping[str, float]) -> str:
    """The output with the most noise; one that is not a number is worst of all."""
    return min(sqnr, key=lambda name: -np.inf if np.isnan(sqnr[name]) else sqnr[name])


def relaxed(percent: float, samples: int) -> float:
    """A lower bound on a share of the samples, less one standard error of that share."""
    return percent - float(np.sqrt(percent * (100 - percent) / samples))


def check_quantized(hub: Hub, file: File) -> Check:
    """An integer file without a single integer product is a silent no-op; where the network has no products, one
    without a single integer operator. The same holds for fp8."""
    products = [d for d in hub.decisions if d.operator in PRODUCTS]
    kinds = PRODUCTS if products else {d.operator for d in hub.decisions}
    integer = sum(n for operator, n in file.quantized.items() if operator in kinds)
    total = len(products or hub.decisions)
    what = "convolutions and matrix products" if products else "operators"
    kind = "integer" if is_integer(file.precision) else file.precision
    return Check(
        f"{kind} {'products' if products else 'operators'}", file.precision, float(integer), 1.0, integer >= 1,
        f"{integer} of {total} {what}",
    )  # fmt: skip


def shrink_notes(folder: Path, files: Sequence[File]) -> tuple[str, ...]:
    """Says aloud when a quantized file did not get smaller."""
    sizes = {f.precision: f.size(folder) for f in files}
    base = sizes.get("fp32")
    return tuple(
        f"{f.path} is {sizes[f.precision] / base:.2f} x the size of the fp32 file: {_why_large(folder, f)}"
        for f in files
        if base and is_quantized(f.precision) and sizes[f.precision] > 0.5 * base
    )


def _why_large(folder: Path, file: File) -> str:
    """What keeps a quantized file from being smaller, as far as the file shows it."""
    if not file.quantized:
        return "none of its operators is quantized"
    graph, weights = (folder / file.path).stat().st_size, sum((folder / part).stat().st_size for part in file.parts)
    if file.parts and graph > weights:
        return f"its weights take {weights:,} bytes, the description of its graph {graph:,}"
    return "its weights are too few to matter, or that file keeps them as codes already"
