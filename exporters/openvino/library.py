"""OpenVINO's Python package, imported so that it stays quiet."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, cast

from deploykit.core.errors import MissingExtra

STATISTICS = "openvino_telemetry"
"""The package through which ``import openvino`` reports its own use over the network and leaves a file in the home."""


def openvino() -> Any:
    """The package, without its usage statistics: it works without that package and is made to believe it is missing.

    A program that has imported OpenVINO itself keeps it as it is.

    Raises:
        MissingExtra: OpenVINO is not installed.
    """
    modules = cast(dict[str, ModuleType | None], sys.modules)
    hide = STATISTICS not in modules
    if hide:
        modules[STATISTICS] = None
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise MissingExtra("OpenVINO files", "openvino") from None
    finally:
        if hide:
            del modules[STATISTICS]
