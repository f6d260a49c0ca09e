"""The generated .tflite schema, imported here only: it comes with LiteRT but carries no promise to stay the same."""

from __future__ import annotations

from deploykit.core.errors import MissingExtra

try:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
except ImportError:
    raise MissingExtra("writing .tflite files", "tflite") from None

__all__ = ["flatbuffers", "schema"]
