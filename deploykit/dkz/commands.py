"""``deploykit pack`` and ``deploykit unpack``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

Coder = Annotated[
    str | None, typer.Option(help="rans, huffman or contexts; default: whichever is shortest", metavar="CODER")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there")]


def pack(
    model: Annotated[Path, typer.Argument(help="A file: .onnx, .tflite, OpenVINO's .xml, or any other")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The .dkz; default: beside the file")] = None,
    coder: Coder = None,
    layers: Annotated[bool, typer.Option("--layers", help="What each step saved of each weight, too")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a model's file smaller without loss; `unpack` gives it back bit by bit."""
    from deploykit.dkz.files import pack_file

    found = pack_file(model, out, overwrite, coder)
    _print(found, as_json)
    if layers and not as_json:
        from rich.console import Console

        from deploykit.dkz.stages import table

        Console(width=None if sys.stdout.isatty() else 140).print(table(found.layers))


def unpack(
    container: Annotated[Path, typer.Argument(help="A .dkz that `pack` wrote")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for its files")],
    limit: Annotated[int, typer.Option(help="Bytes that may come out, at most", min=1)] = 1 << 32,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the files of a .dkz, bit by bit those that were packed."""
    from deploykit.dkz.files import unpack_file

    _print(unpack_file(container, out, overwrite, limit), as_json)


def _print(found: Any, as_json: bool) -> None:
    print(json.dumps(asdict(found), indent=1, default=str) if as_json else found.line())
