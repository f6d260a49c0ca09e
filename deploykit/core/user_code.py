"""Functions of the user's, named in an argument as ``file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.files import no_such_file

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """Imports the user's code and returns the function it names.

    Modules are found as ``python file.py`` would find them: beside the file, or in the working directory.

    Args:
        spec: ``file.py:function`` or ``package.module:function``.
        what: the function's part in the command, for messages: ``"factory"``, ``"loader"``, ``"loss"``.

    Raises:
        DeploykitError: no such file, module or function (with the nearest name), or the code fails while imported.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise DeploykitError(f"'{spec}' does not name a {what}; write file.py:{what} or package.module:{what}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, name, None)
    if function is None:
        own = [n for n, v in vars(module).items() if callable(v) and _is_from(module, v) and not n.startswith("_")]
        raise DeploykitError(f"{place}: {unknown(what, name, own)}")
    if not callable(function):
        raise DeploykitError(f"{spec} is no function but {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def call(spec: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the user's function; what it raises becomes one line that says what and where.

    Raises:
        DeploykitError: the function failed.
    """
    try:
        return function(*arguments)
    except DeploykitError:
        raise
    except (Exception, SystemExit) as error:
        code = getattr(function, "__code__", None)
        raise _failure(f"{spec} raised", error, code.co_filename if code else None) from error


def source_files(spec: str) -> dict[str, Path]:
    """The Python files behind a function of the user's: the one it is in, and those beside and below it that it uses.

    What is installed is left out, since its version tells.

    Args:
        spec: as for `load_function`.

    Returns:
        Files by the path they would be typed with where ``spec`` was (a module's by its place in its package), sorted.
    """
    place = spec.rpartition(":")[0]
    is_file = place.endswith(".py")
    first = _import_file(Path(place)) if is_file else _import_module(place)
    if first.__name__.partition(".")[0] == "deploykit" or _file(first) is None:
        return {}
    depth = 0 if is_file else first.__name__.count(".") + (Path(str(first.__file__)).name == "__init__.py")
    root = Path(str(first.__file__)).resolve().parents[depth]
    typed = Path(place).parent if is_file else Path()
    found: set[Path] = set()
    waiting = [first]
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if file is None or file in found or root not in file.parents:
            continue
        found.add(file)
        values = [v for v in list(vars(module).values()) if isinstance(v, (ModuleType, type, FunctionType))]
        used = [v if isinstance(v, ModuleType) else sys.modules.get(v.__module__) for v in values]
        waiting += [m for m in used if m is not None]
    return {(typed / file.relative_to(root)).as_posix(): file for file in sorted(found)}


def _file(module: ModuleType) -> Path | None:
    """Where a module was read from, unless it is installed."""
    file = Path(str(getattr(module, "__file__", None) or "built-in")).resolve()
    installed = {"site-packages", "dist-packages"} & set(file.parts) or STANDARD_LIBRARY in file.parents
    return file if file.suffix == ".py" and file.is_file() and not installed else None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise no_such_file(path)
    file = str(path.resolve())
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == file:
        return loaded
    # under its own name other processes (data loading workers) can import it too
    name = path.stem if loaded is None else file
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    _search_first(str(path.resolve().parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failure(f"{path} cannot be imported:", error, file) from error
    return module


def _import_module(name: str) -> ModuleType:
    _search_first(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _failure(f"module '{name}' cannot be imported:", error, None) from error


def _search_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _is_from(module: ModuleType, value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith(module.__name__)


def _failure(what: str, error: BaseException, file: str | None) -> DeploykitError:
    """One line of an exception: its innermost frame in the user's file, or in any file if that is not on the way."""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}, line {error.lineno})"
        return DeploykitError(f"{what} {type(error).__name__}: {error.msg}{place}")
    machinery = ("<frozen", importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(machinery)]
    frame = next((f for f in reversed(frames) if f.filename == file), frames[-1] if frames else None)
    known = frame is not None and Path(frame.filename) != Path(__file__)
    place = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame is not None and known else ""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return DeploykitError(f"{what} {type(error).__name__}{': ' + lines[0] if lines else ''}{place}")
