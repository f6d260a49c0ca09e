"""deploykit turns a PyTorch model and some sample data into files that run on the device you name.

>>> import deploykit as dk
>>> artifact = dk.export(model, target="x86", calibration=loader)      # doctest: +SKIP
>>> artifact(x)                                                        # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.api import export, load, open_artifact

__all__ = ["export", "load", "open_artifact"]


def __getattr__(name: str) -> Any:
    """Torch and onnx are loaded when they are first needed."""
    if name in __all__:
        from deploykit import api

        return getattr(api, name)
    raise AttributeError(f"module 'deploykit' has no attribute '{name}'")
