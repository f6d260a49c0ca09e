"""Models in: every form of MODEL becomes a `Model`; compressed modules are written to folders and read back."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from deploykit.core.artifact import TensorSpec
from deploykit.core.errors import DeploykitError, some
from deploykit.core.files import no_such_file
from deploykit.core.progress import say
from deploykit.core.recipe import Stage
from deploykit.core.seeds import seeded
from deploykit.core.user_code import call, load_function
from deploykit.exits.places import Places

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMS = "file.py:factory, package.module:factory, a .pt2, an .onnx, or a folder that `deploykit compress` wrote"
FORMAT = "deploykit-structure-1"


@dataclass(frozen=True)
class Model:
    """A model as it came in: exactly one of the three."""

    origin: str
    """The MODEL argument, or what stands for it in messages."""
    module: nn.Module | None = None
    """In eval mode."""
    program: torch.export.ExportedProgram | None = None
    onnx: Path | None = None
    compressed: bool = False
    """Read from a folder that `save_compressed` wrote."""

    @property
    def enters(self) -> Stage:
        """The first stage that can work on it."""
        return "graph" if self.module is None else "model"


@dataclass(frozen=True)
class Factors:
    """What a layer was decomposed into."""

    form: str
    """A name in `deploykit.low_rank.forms`."""
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """``structure.json`` in a folder that `save_compressed` wrote."""

    format: str
    model: str
    """How to make the module; a file is meant relative to the folder, unless it is absolute."""
    parameters: dict[str, Literal["mask"]] = field(default_factory=dict)
    """Parameters with structure, and of which kind. mask: zeros of the stored weight stay zero."""
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """By layer, how many channels it has where that is not what the factory makes."""
    factors: dict[str, Factors] = field(default_factory=dict)
    """Layers that were decomposed; their parts have sizes of their own where they were pruned afterwards."""
    exits: Places | None = None
    """Early exits that `deploykit.exits.network.attach` gave it; its layers are then those of the whole."""


def load_model(spec: str, weights: Path | None = None) -> Model:
    """The model behind a MODEL argument. Factories' modules are put into eval mode.

    Factories run the user's code, and torch evaluates expressions in ``.pt2`` files: load only what you trust. Weights
    are read without executing anything.

    Args:
        spec: ``file.py:factory`` or ``package.module:factory`` (a function without arguments that returns an
            nn.Module), ``x.pt2``, ``x.onnx``, or a folder that `save_compressed` wrote.
        weights: ``.safetensors``, or a ``.pt``/``.pth`` that holds a state dict; for factories only.

    Raises:
        DeploykitError: nothing there, a factory that fails, weights that do not fit, a file that is not what its name
            says.
    """
    from deploykit.hub.weight_hooks import without_weight_hooks

    path = Path(spec)
    if ":" in spec and not path.exists():
        module = _build(spec)
        if weights is not None:
            _fit_weights(module, _read_weights(weights), str(weights), spec)
        return Model(spec, module=without_weight_hooks(module.eval()))
    _refuse_form(spec, path)
    if weights is not None:
        raise DeploykitError(f"{spec} brings its own weights; leave out --weights {weights}")
    if path.is_dir():
        return Model(spec, module=_load_compressed(path), compressed=True)
    if path.suffix == ".pt2":
        return Model(spec, program=_read_program(path))
    if not path.stat().st_size:
        raise DeploykitError(f"{spec} is empty: export the model again")
    return Model(spec, onnx=path)


def _refuse_form(spec: str, path: Path) -> None:
    """Raises unless it is a folder, a .pt2 or an .onnx."""
    if path.is_dir():
        return
    if path.suffix in (".pt2", ".onnx"):
        if not path.is_file():
            raise no_such_file(path)
    elif path.suffix == ".py":
        raise DeploykitError(f"{spec}: name the function that makes the model too: {spec}:build")
    elif path.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin"):
        raise DeploykitError(f"{spec} holds weights, not a model: give MODEL as file.py:factory, and --weights {spec}")
    elif not path.exists():
        raise DeploykitError(f"there is no file or folder '{spec}'. MODEL is {FORMS}.")
    else:
        raise DeploykitError(f"{spec} is no MODEL; expected {FORMS}")


def accept_module(module: Any) -> Model:
    """The model behind a Python object.

    Raises:
        DeploykitError: not an nn.Module, or one that is (partly) in training mode: what training mode computes is not
            what a device should, and whoever passes a module decides its mode.
    """
    from torch import nn

    from deploykit.hub.weight_hooks import without_weight_hooks

    if not isinstance(module, nn.Module):
        raise DeploykitError(f"a model must be an nn.Module or a MODEL argument ({FORMS}); given {_kind(module)}")
    if module.training:
        raise DeploykitError(f"the model ({_kind(module)}) is in training mode: call .eval() first")
    for name, part in module.named_modules():
        if part.training:
            raise DeploykitError(f"'{name}' ({_kind(part)}) is in training mode: call .eval() on the whole model first")
    return Model(_kind(module), module=without_weight_hooks(module))


def input_specs(model: Model) -> tuple[TensorSpec, ...]:
    """The model's inputs by forward-argument name.

    A module does not say what its inputs look like: shape ``()`` and dtype ``""`` stand for unknown.

    Raises:
        DeploykitError: the forward has no named arguments, or an .onnx that is not valid.
    """
    if model.onnx is not None:
        from deploykit.hub.graph import specs
        from deploykit.hub.lower import read_onnx

        return specs(list(read_onnx(model.onnx).model.graph.inputs))
    if model.program is not None:
        wanted = set(model.program.graph_signature.user_inputs)
        values = [(n.name, n.meta["val"]) for n in model.program.graph.nodes if n.name in wanted]
        return tuple(
            TensorSpec(name, tuple(d if isinstance(d, int) else str(d) for d in v.shape), str(v.dtype)[len("torch.") :])
            for name, v in values
        )
    assert model.module is not None
    parameters = inspect.signature(model.module.forward).parameters.values()
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not names:
        raise DeploykitError(f"{model.origin}: the forward has no named arguments; write them out instead of *args")
    return tuple(TensorSpec(name, (), "") for name in names)


def factory_of(folder: Path) -> str:
    """The factory that a folder of `save_compressed` was made from, as it would be typed where the folder was.

    Raises:
        DeploykitError: not such a folder.
    """
    spec = _read_structure(folder).model
    place, _, name = spec.rpartition(":")
    return f"{os.path.normpath(folder / place)}:{name}" if place.endswith(".py") else spec


def save_compressed(module: nn.Module, folder: Path, origin_spec: str) -> None:
    """Writes ``model.safetensors`` and ``structure.json``; `load_model` reads the folder back.

    Weights are stored under their plain names with their zeros in place; which of them stay zero is known from
    the zeros themselves.

    Args:
        module: what ``origin_spec`` made, with masks on some weights, some of its layers narrower, some decomposed.
        folder: an existing, empty folder.
        origin_spec: the MODEL argument the module came from. A file is noted relative to the folder, so that both
            can be moved together, unless they share no folder but the root.

    Raises:
        DeploykitError: the module did not come from a factory, or its structure cannot be written down.
    """
    from safetensors.torch import save

    from deploykit.exits.network import WithExits
    from deploykit.low_rank.surgery import factors_of, give_factors
    from deploykit.pruning.sizes import changed_sizes, resize

    state, masked = _plain_state(module)
    spec = _portable(origin_spec, folder.resolve())
    places = module.places if isinstance(module, WithExits) else None
    made = _whole(_build(_absolute(spec, folder)), places)
    sizes, factors = changed_sizes(module, made), factors_of(module)
    if factors:  # their parts may have been narrowed in turn
        resize(made, sizes, state)
        give_factors(made, factors)
        sizes |= changed_sizes(module, made)
    noted = {name: Factors(form, ranks) for name, (form, ranks) in factors.items()}
    structure = Structure(FORMAT, spec, dict.fromkeys(masked, "mask"), sizes, noted, places)
    # bytes, not save_file: a full disk is then an OSError like any other
    (folder / "model.safetensors").write_bytes(save({k: v.cpu().contiguous().clone() for k, v in state.items()}))
    (folder / "structure.json").write_bytes(msgspec.json.format(msgspec.json.encode(structure), indent=1) + b"\n")


def _load_compressed(folder: Path) -> nn.Module:
    from deploykit.hub.structure import attach_mask
    from deploykit.low_rank.surgery import give_factors
    from deploykit.pruning.sizes import resize

    structure = _read_structure(folder)
    spec = structure.model
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        file = Path(os.path.normpath(folder / place))
        if not file.is_file():
            raise DeploykitError(
                f"{folder} is made from {spec}, but there is no {file}. "
                f"Put it back, or change 'model' in {folder / 'structure.json'}."
            )
        spec = f"{file}:{name}"
    module = _whole(_build(spec), structure.exits)
    file = folder / "model.safetensors"
    weights = _read_weights(file)
    own = {name: sizes for name, sizes in structure.sizes.items() if name.rpartition(".")[0] not in structure.factors}
    try:
        resize(module, own, weights)
        give_factors(module, {name: (made.form, made.ranks) for name, made in structure.factors.items()})
        resize(module, {name: sizes for name, sizes in structure.sizes.items() if name not in own}, weights)
    except DeploykitError as error:
        raise DeploykitError(f"{folder / 'structure.json'} does not fit {spec}: {error}") from None
    _fit_weights(module, weights, str(file), spec)
    for parameter in structure.parameters:
        owner, _, leaf = parameter.rpartition(".")
        try:
            weight = module.get_parameter(parameter)
        except AttributeError:
            raise DeploykitError(f"{folder / 'structure.json'}: {spec} has no parameter '{parameter}'") from None
        attach_mask(module.get_submodule(owner), leaf, weight != 0)
    return module.eval()


def _whole(network: nn.Module, places: Places | None) -> nn.Module:
    """The network with plain parameters, and with its exits where it has some."""
    from deploykit.exits.network import attach
    from deploykit.hub.weight_hooks import without_weight_hooks

    network = without_weight_hooks(network.eval())
    try:
        return network if places is None else attach(network, places)
    except DeploykitError as error:
        raise DeploykitError(f"the exits in structure.json do not fit the model: {error}") from None


def _read_structure(folder: Path) -> Structure:
    file = folder / "structure.json"
    if not file.is_file():
        is_export = (folder / "manifest.json").is_file()
        hint = " It is what an export wrote; MODEL is what goes in." if is_export else ""
        raise DeploykitError(f"{folder} is not a folder that `deploykit compress` wrote: no structure.json.{hint}")
    try:
        structure = msgspec.json.decode(file.read_bytes(), type=Structure)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DeploykitError(f"{file} is not what `deploykit compress` wrote: {error}") from None
    if structure.format != FORMAT:
        raise DeploykitError(f"{file}: format '{structure.format}' is not known to this version")
    return structure


def _portable(spec: str, folder: Path) -> str:
    if Path(spec).is_dir():  # compressed once more
        spec = _absolute(_read_structure(Path(spec)).model, Path(spec))
    place, _, name = spec.rpartition(":")
    if not place:
        raise DeploykitError(f"{spec}: only models from a factory can be written to a folder; give file.py:factory")
    if not place.endswith(".py"):
        return spec
    file = Path(place).resolve()
    if Path(os.path.commonpath([file, folder])) == Path(file.anchor):
        return f"{file}:{name}"
    return f"{Path(os.path.relpath(file, folder)).as_posix()}:{name}"


def _absolute(spec: str, folder: Path) -> str:
    place, _, name = spec.rpartition(":")
    return f"{(folder / place).resolve()}:{name}" if place.endswith(".py") else spec


def _plain_state(module: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict with masked weights under their plain names, and those names."""
    from torch.nn.utils import parametrize

    from deploykit.hub.structure import mask_of

    state, masked = dict(module.state_dict()), []
    for path, layer in module.named_modules():
        for leaf in list(layer.parametrizations) if parametrize.is_parametrized(layer) else []:
            if mask_of(layer, leaf) is None:
                continue
            prefix = f"{path}." if path else ""
            keys = [k for k in state if k.startswith(f"{prefix}parametrizations.{leaf}.")]
            if len(keys) != 2:
                raise DeploykitError(
                    f"{prefix}{leaf} was parametrized (weight norm or the like) before it was pruned; "
                    f"remove that parametrization in the factory"
                )
            for key in keys:
                del state[key]
            state[f"{prefix}{leaf}"] = getattr(layer, leaf).detach()
            masked.append(f"{prefix}{leaf}")
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        if other != name and "parametrizations" in name + other:
            raise DeploykitError(f"{other} and {name} are one shared weight; it cannot be masked in one place only")
    return state, sorted(masked)


def _build(spec: str) -> nn.Module:
    """Calls the factory, which draws the same weights every time unless it sets a seed of its own."""
    from torch import nn

    factory = load_function(spec, "factory")
    if isinstance(factory, nn.Module):
        raise DeploykitError(f"{spec} is a model, not a function that makes one: write `def build(): return ...`")
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # written in C; the call will tell
        parameters = dict[str, inspect.Parameter]().values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        name = spec.rpartition(":")[2]
        raise DeploykitError(
            f"factory {spec} needs arguments ({', '.join(needed)}); "
            f"write a function without any: def build(): return {name}({needed[0]}=...)"
        )
    with seeded(0):
        module = call(f"factory {spec}", factory)
    if not isinstance(module, nn.Module):
        raise DeploykitError(f"factory {spec} returned {_kind(module)}, no nn.Module")
    return module


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file; nothing in it is executed."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise no_such_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DeploykitError(f"{path} is damaged or no safetensors file: {_first_line(error)}") from None
    if path.suffix not in (".pt", ".pth"):
        raise DeploykitError(f"weights are .safetensors, .pt or .pth; given {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign is None:
            raise DeploykitError(f"{path} is damaged or no file of weights ({type(error).__name__})") from None
        raise DeploykitError(
            f"{path} holds more than weights ({foreign[1]}), and reading that would run code from the file. Load it "
            f"where it was made and save the weights alone: torch.save(model.state_dict(), ...)."
        ) from None
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise DeploykitError(f"{path} holds {_kind(found)}; expected a state dict")
    if found and not any(isinstance(v, torch.Tensor) for v in found.values()):
        raise DeploykitError(
            f"{path} holds no state dict: its keys are {some([str(k) for k in found], 8)}. "
            f"Expected weights by parameter name, at the top or under 'state_dict'."
        )
    return dict(found)


def _fit_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], file: str, spec: str) -> None:
    """Loads the weights; only batch norm's counters may be absent."""
    wrapped = "module."
    if weights and all(key.startswith(wrapped) for key in weights):
        say(f"note: {file} was saved from a DataParallel model; '{wrapped}' is taken off its names")
        weights = {key.removeprefix(wrapped): value for key, value in weights.items()}
    state = module.state_dict()
    missing = [k for k in state if k not in weights and not k.endswith("num_batches_tracked")]
    foreign = [k for k in weights if k not in state]
    misshapen = [
        f"{k} {_shape(weights[k])} instead of {_shape(state[k])}"
        for k in state if k in weights and _shape(weights[k]) != _shape(state[k])
    ]  # fmt: skip
    parts = (("missing", missing), ("not in the model", foreign), ("wrong shape", misshapen))
    problems = [f"{what}: {some(names, 8)}" for what, names in parts if names]
    if problems:
        raise DeploykitError(f"{file} does not fit {spec}; {'; '.join(problems)}")
    module.load_state_dict(weights, strict=False)


def _read_program(path: Path) -> torch.export.ExportedProgram:
    import torch

    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:  # torch raises whatever its parsers raise
        raise DeploykitError(f"{path} is damaged or no exported program: {_first_line(error)}") from None
    finally:
        logger.setLevel(level)
    trained = sorted({str(n.target) for n in program.graph.nodes if _is_training(n)})
    if trained:
        raise DeploykitError(f"{path} was exported in training mode ({some(trained)}); call .eval() before exporting")
    return program


def _is_training(node: torch.fx.Node) -> bool:
    """Whether an operator (batch norm, dropout) was recorded with its training flag on."""
    schema = getattr(node.target, "_schema", None)
    flags = [i for i, a in enumerate(schema.arguments) if a.name in ("training", "train")] if schema else []
    return any(len(node.args) > i and node.args[i] is True for i in flags)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
