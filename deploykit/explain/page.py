"""An explanation as a page: one HTML file, made like the report."""

from __future__ import annotations

from pathlib import Path

from deploykit.core.errors import DeploykitError
from deploykit.core.files import write_in_place
from deploykit.explain import told
from deploykit.explain.explanation import Explanation
from deploykit.report import findings
from deploykit.report.html import fill
from deploykit.report.write import is_report

NAME = "explanation.html"


def place(out: Path) -> Path:
    """Where the page will lie: ``out``, or ``explanation.html`` in it where that is a folder.

    Raises:
        DeploykitError: there is a file that is no page of deploykit.
    """
    path = out / NAME if out.is_dir() else out
    if path.exists() and not is_report(path):
        raise DeploykitError(f"{path} exists and is not a page that deploykit wrote; give another -o")
    return path


def write_page(e: Explanation, path: Path) -> None:
    """Writes the page.

    Raises:
        DeploykitError: it cannot be written.
        MissingExtra: jinja2 is not installed.
    """
    write_in_place(path, render(e))


def render(e: Explanation) -> str:
    """The page. Equal explanations give equal bytes."""
    return fill(
        "explanation.html.j2",
        e=e,
        summary=told.summary(e),
        lines=list(told.lines(e)),
        findings=findings.shown(told.findings(e)),
        spans=e.spans,
        tensors=e.tensors,
        thresholds=e.thresholds,
        histograms=any(s.outline for s in e.spans),
    )
