"""From nn.Module (or a user's .onnx) to the float graph: BN folded, constants folded, values named by module path."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.core.progress import say
from deploykit.hub.canonical import Dim, canonical, computed_shapes, dims, refuse_branches, refuse_passing_through
from deploykit.hub.external import leave_outside, load_small
from deploykit.hub.graph import (
    NAMES,
    FloatGraph,
    constant,
    drop_unused,
    fresh_name,
    take_name,
)
from deploykit.hub.shapes import complete_shapes, without_weights

if TYPE_CHECKING:
    import onnx
    import torch
    from numpy.typing import NDArray

OPSET = 20
"""LayerNormalization, Gelu and HardSwish are single operators here, and ReduceMean takes its axes as an input."""
OLDEST_OPSET = 11
FOLD_LIMIT = 1 << 28
"""Constants up to this many bytes are folded; recurrent weights are reordered by folded Slice and Concat nodes."""


def lower(module: torch.nn.Module, example: Mapping[str, NDArray[Any]]) -> FloatGraph:
    """The float graph of a module in eval mode.

    Masks that model-stage passes left on the module (parametrizations) are baked into the weights and become the
    graph's ``masks``. The module is not changed.

    Args:
        module: any nn.Module; outputs may be a tensor, a tuple or a dict of tensors.
        example: arrays ``[n >= 2, ...]`` by forward-argument name.

    Raises:
        DeploykitError: the forward does not take these inputs, or torch cannot export the module.
    """
    import torch

    from deploykit.hub.structure import bake

    plain, masks = bake(module)
    plain.eval()
    names = _argument_names(plain, example)
    arguments = tuple(torch.from_numpy(np.ascontiguousarray(example[n])) for n in names)
    try:
        with torch.no_grad():
            outputs = plain(*arguments)
    except Exception as error:
        shapes = ", ".join(f"{n} {tuple(a.shape)} {a.dtype}" for n, a in zip(names, arguments, strict=True))
        raise DeploykitError(
            f"the model's forward fails on the sample inputs ({shapes}): {type(error).__name__}: {_first_line(error)}"
            + "".join(_turned(n, a.shape) for n, a in zip(names, arguments, strict=True))
        ) from error
    output_names = _output_names(outputs)
    _refuse_outputs(outputs, output_names, names)
    notes: tuple[str, ...] = ()
    try:
        program = _export(plain, arguments, names, output_names, dynamic=True)
    except Exception as dynamic_error:
        single = tuple(a[:1] for a in arguments)
        try:
            program = _export(plain, single, names, output_names, dynamic=False)
        except Exception as error:
            raise DeploykitError(f"torch cannot export this model to ONNX: {_cause(error)}") from error
        notes = (f"exported with batch 1 only: a free batch dimension failed ({_cause(dynamic_error)})",)
        say(f"note: {notes[0]}")
    model = simplify(program)
    _name_by_module(model.graph)
    found = _follow_masks(model.graph, masks, plain)
    _check_masks(model.graph, found)
    return FloatGraph(model, found, notes)


def lower_program(program: torch.export.ExportedProgram) -> FloatGraph:
    """The float graph of a torch.export program (a ``.pt2`` file); its free dimensions stay what they are.

    Raises:
        DeploykitError: torch cannot export the program.
    """
    import torch

    inputs = list(program.graph_signature.user_inputs)
    outputs = [f"output_{i}" for i in range(len(program.graph_signature.user_outputs))]
    with _quiet():
        try:
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=inputs,
                output_names=outputs if len(outputs) > 1 else ["output"], external_data=False, opset_version=OPSET,
            )  # fmt: skip
        except Exception as error:
            raise DeploykitError(f"torch cannot export this program to ONNX: {_cause(error)}") from error
    assert exported is not None
    model = simplify(_asserted(exported.model))
    _name_by_module(model.graph)
    return _one_or_any(FloatGraph(model), "this program")


def read_onnx(path: Path) -> FloatGraph:
    """The float graph of a user's ``.onnx``.

    Large weights in files beside it stay there: they are read one at a time, whenever they are needed.

    Raises:
        DeploykitError: missing, truncated or foreign file; already quantized; operator set too old.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise DeploykitError(f"no file {path}")
    try:
        proto = onnx.load(path, load_external_data=False)
        load_small(proto, path.parent)
        onnx.checker.check_model(without_weights(proto))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise DeploykitError(f"{path} is not a valid ONNX model: {_first_line(error)}") from None
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearConv") for node in proto.graph.node):
        raise DeploykitError(f"{path} is already quantized; deploykit starts from the float model")
    return from_proto(proto, str(path), path.parent)


def from_proto(proto: onnx.ModelProto, origin: str, folder: Path | None = None) -> FloatGraph:
    """The float graph of an ONNX model in memory, but for weights in files of ``folder``; see `read_onnx`."""
    import onnx

    for imported in proto.opset_import:
        imported.domain = "" if imported.domain == "ai.onnx" else imported.domain
    opset = next((o.version for o in proto.opset_import if o.domain == ""), 0)
    if opset < OLDEST_OPSET:
        raise DeploykitError(f"{origin} uses operator set {opset}; {OLDEST_OPSET} or later is needed")
    if opset < OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, OPSET)
        except (RuntimeError, ValueError) as error:
            raise DeploykitError(
                f"{origin}: cannot raise operator set {opset} to {OPSET} ({_first_line(error)}). "
                f"Export it with opset_version={OPSET}."
            ) from None
    known = {info.name for info in (*proto.graph.value_info, *proto.graph.output)}
    if any(name not in known for node in proto.graph.node for name in node.output if name):
        inferred = onnx.shape_inference.infer_shapes(without_weights(proto))
        proto.graph.value_info.extend(info for info in inferred.graph.value_info if info.name not in known)
    model = ir.from_proto(proto)
    if folder is not None:
        leave_outside(model.graph, folder)
    initialized = set(model.graph.initializers)
    for value in [v for v in model.graph.inputs if v.name in initialized]:  # IR < 4 lists weights as inputs
        model.graph.inputs.remove(value)
    return _one_or_any(FloatGraph(simplify(model)), origin)


def _one_or_any(graph: FloatGraph, origin: str) -> FloatGraph:
    """Refuses a fixed batch other than 1: data comes one sample at a time."""
    if graph.batch not in (None, 1):
        raise DeploykitError(
            f"{origin} takes exactly {graph.batch} samples at once; export it with a free batch dimension, or with 1"
        )
    return graph


def simplify(model: ir.Model) -> ir.Model:
    """Folds constants and batch normalisation, drops what nobody reads. Changes and returns ``model``."""
    if not _is_simple(model.graph):
        model = _fold(model)
    model.graph.meta.pop(NAMES, None)
    _lift_constants(model.graph)
    _name_nodes(model.graph)
    refuse_branches(model.graph)
    refuse_passing_through(model.graph)
    before, left = -1, computed_shapes(model.graph)
    while left != before:  # one may be known once another is
        canonical(model.graph)
        drop_unused(model.graph)
        complete_shapes(model)
        before, left = left, computed_shapes(model.graph)
    for value in model.graph.initializers.values():
        if value.const_value is not None and not isinstance(value.const_value, ir.LazyTensor):
            value.const_value = ir.tensor(np.asarray(value.const_value.numpy(), order="C"), name=value.name)
    model.graph.sort()
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "deploykit", "", ""
    model.graph.meta.pop(NAMES, None)  # whoever changes the graph next looks at its names anew
    return model


def _is_simple(graph: ir.Graph) -> bool:
    """Whether nothing can be folded: no normalisation, no idle nodes, nothing computed from constants alone."""
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type in ("BatchNormalization", "Constant", "Identity", "Dropout", "Cast"):
            return False
        if all(v.is_initializer() or v.const_value is not None for v in inputs):
            return False
    return True


def _fold(model: ir.Model) -> ir.Model:
    import onnxscript.optimizer
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import (
        fuse_batchnorm_into_conv_rule,
        fuse_batchnorm_into_conv_transpose_rule,
        fuse_batchnorm_into_gemm_rule,
    )

    with _quiet():
        rules = [fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule]
        model = rewrite(model, pattern_rewrite_rules=rules)
        onnxscript.optimizer.optimize(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    return model


def _name_nodes(graph: ir.Graph) -> None:
    """Every node gets a name of its own: the plan and the report are kept by layer."""
    seen: set[str | None] = {None, ""}
    for node in graph:
        if node.name in seen:
            node.name = fresh_name(graph, node.outputs[0].name or node.op_type.lower())
        seen.add(node.name)


def _lift_constants(graph: ir.Graph) -> None:
    """Constant nodes become initializers, so that there is one way to hold a constant."""
    for node in [n for n in graph if n.op_type == "Constant"]:
        value = node.outputs[0]
        array = constant(value)
        if array is None:
            tensor = next(iter(node.attributes.values())).value
            array = tensor.numpy() if hasattr(tensor, "numpy") else np.asarray(tensor)
        name = value.name or f"constant_{len(graph.initializers)}"
        held = ir.Value(
            name=name, const_value=ir.tensor(array, name=name),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape),
        )  # fmt: skip
        for user, position in list(value.uses()):
            user.replace_input_with(position, held)
        graph.remove(node, safe=True)
        graph.register_initializer(held)


def _export(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    names: list[str],
    output_names: list[str],
    dynamic: bool,
) -> ir.Model:
    import torch

    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in arguments) if dynamic else None
    with _quiet():
        program = torch.onnx.export(
            module, arguments, dynamo=True, verbose=False, input_names=names, output_names=output_names,
            dynamic_shapes=shapes, external_data=False, opset_version=OPSET,
        )  # fmt: skip
    assert program is not None
    return _asserted(program.model)


def _asserted(model: ir.Model) -> ir.Model:
    got = model.opset_imports.get("", 0)
    if got != OPSET:  # torch does not always honour the request and says nothing
        raise DeploykitError(f"torch exported operator set {got}, asked was {OPSET}")
    return model


def _argument_names(module: torch.nn.Module, example: Mapping[str, Any]) -> list[str]:
    """The forward's arguments for which there is data, in the forward's order."""
    signature = inspect.signature(module.forward)
    known = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [n for n in known if signature.parameters[n].default is inspect.Parameter.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()) and not known:
        return list(example)
    missing = [n for n in required if n not in example]
    foreign = [n for n in example if n not in known]
    if missing or foreign:
        raise DeploykitError(
            f"the model's forward takes {', '.join(known)}; the data has {', '.join(example)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
        )
    return [n for n in known if n in example]


def _turned(name: str, shape: Sequence[int]) -> str:
    """A hint where an input looks like images with their channels last."""
    if len(shape) != 4 or shape[3] not in (1, 3, 4) or shape[1] in (1, 3, 4):
        return ""
    return f". '{name}' looks like channels-last images [n, h, w, c]: transpose them to [n, c, h, w]"


def _refuse_outputs(outputs: Any, names: list[str], inputs: list[str]) -> None:
    listed = (
        [outputs] if hasattr(outputs, "ndim") else list(outputs.values() if hasattr(outputs, "values") else outputs)
    )
    for name, output in zip(names, listed, strict=True):
        if output.ndim == 0:
            raise DeploykitError(
                f"output '{name}' of the model is a single number; every output needs a batch dimension"
            )
        if name in inputs:
            raise DeploykitError(f"output '{name}' of the model has the name of an input; give it another")


def _output_names(outputs: Any) -> list[str]:
    import torch

    if isinstance(outputs, torch.Tensor):
        return ["output"]
    if isinstance(outputs, Mapping) and all(isinstance(o, torch.Tensor) for o in outputs.values()):
        return [str(k) for k in outputs]
    if isinstance(outputs, (tuple, list)) and all(isinstance(o, torch.Tensor) for o in outputs):
        return [f"output_{i}" for i in range(len(outputs))]
    raise DeploykitError(
        f"the model returns {type(outputs).__name__}; a tensor, or a flat tuple or dict of tensors, is needed"
    )


def _name_by_module(graph: ir.Graph) -> None:
    """Names nodes, and the values they write, after the module that made them: ``layer1.0.conv1``."""
    taken = {v.name for v in [*graph.inputs, *graph.outputs]} | set(graph.initializers)
    outputs = {id(v) for v in graph.outputs}
    free = {dims(v)[0] for v in graph.inputs if v.shape} - {None}
    for value in graph.inputs:  # torch numbers free dimensions per process
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(d, free) for d in dims(value)])
    for node in graph:
        node.name = take_name(_module_path(node), taken)
        for number, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = node.name if number == 0 else take_name(f"{node.name}.{number}", taken)
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(d, free) for d in dims(value)])
            value.metadata_props.clear()
        node.metadata_props.clear()
        node.doc_string = None


def _renamed(size: Dim, free: set[Dim]) -> Dim:
    """``"batch"`` in place of the free dimension's name, also where it is a factor (``"2*s77"``)."""
    if not isinstance(size, str):
        return size
    return re.sub(r"[A-Za-z_]\w*", lambda word: "batch" if word[0] in free else word[0], size)


def _module_path(node: ir.Node) -> str:
    for value in node.inputs[1:2]:
        if value is not None and value.const_value is not None and (value.name or "").endswith(".weight"):
            return str(value.name).removesuffix(".weight")
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    parts = [s.strip(" '\"") for s in scopes.strip("[]").split(",")]
    parts = [p for p in parts if p]
    if not parts:
        return str(node.op_type).lower()
    return parts[-1] if len(parts) == 1 or parts[-1].startswith(parts[-2]) else f"{parts[-2]}.{parts[-1]}"


def _follow_masks(
    graph: ir.Graph, masks: Mapping[str, NDArray[np.bool_]], module: torch.nn.Module
) -> dict[str, NDArray[np.bool_]]:
    """The masks under the names that lowering gave to their weights; a folded transpose turns a mask with its weight.

    Raises:
        DeploykitError: a masked weight cannot be found again, so its zeros could not be kept.
    """
    parameters = dict(module.named_parameters())
    found: dict[str, NDArray[np.bool_]] = {}
    for name, mask in masks.items():
        if name in graph.initializers:
            found[name] = mask
            continue
        weight = parameters[name].detach().numpy()
        for other, value in graph.initializers.items():
            array = constant(value)
            if array is not None and weight.ndim == 2 and np.array_equal(array, weight.T):
                found[other] = np.ascontiguousarray(mask.T)
            elif array is not None and array.shape == weight.shape and np.array_equal(array, weight):
                found[other] = mask
            else:
                continue
            break
        else:
            raise DeploykitError(f"the pruned weight {name} was changed beyond recognition while lowering")
    return found


def _check_masks(graph: ir.Graph, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    """Folding BN multiplies channels, which keeps zeros zero; anything else that touches them is a bug."""
    for name, mask in masks.items():
        weight = constant(graph.initializers[name])
        assert weight is not None and weight.shape == mask.shape, f"{name} changed shape while lowering"
        assert not weight[~mask].any(), f"lowering filled zeros of {name}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter logs about libraries nobody asked for and prints graphs that fail; errors still raise."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """What torch's export error wraps, and the line of the forward it names."""
    cause = error.__cause__ or error
    node = _untranslated(cause)
    said, trace = f"{type(cause).__name__}: {_first_line(cause)}", str(cause)
    if node is not None:
        inner = cause.__cause__ or cause
        missing = type(inner).__name__ == "DispatchError"
        why = "it has no ONNX form" if missing else f"{type(inner).__name__}: {_first_line(inner)}"
        said, trace = f"operator {node.target}: {why}", node.meta.get("stack_trace") or ""
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.+)', trace)
    if not lines:
        return said
    file, line, text = lines[0] if node is None else lines[-1]
    return f"{said} ({Path(file).name}, line {line}: {text.strip()})"


def _untranslated(error: BaseException) -> torch.fx.Node | None:
    """The operator at which torch's translation to ONNX stopped; its error holds it only in the frames it passed."""
    import torch

    held = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__)]
    nodes = [n for n in held if isinstance(n, torch.fx.Node)]
    return nodes[-1] if nodes and type(error).__name__ == "ConversionError" else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
