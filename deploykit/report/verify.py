"""Whether an artifact is still what was written."""

from __future__ import annotations

from pathlib import Path

from deploykit import exporters
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.manifest import Manifest, changed_files, load_manifest


def verify_artifact(folder: Path) -> tuple[Manifest, list[str]]:
    """An artifact's manifest, and what is wrong with its files, one sentence each.

    Files that are whole are opened in their runtime too, where it is installed.

    Raises:
        DeploykitError: the folder is not an artifact.
    """
    manifest = load_manifest(folder)
    problems = changed_files(folder, manifest)
    if problems:
        return manifest, problems
    for file in manifest.files:
        try:
            exporters.load(manifest.exporter).load(folder / file.path, 1)
        except MissingExtra:
            continue
        except DeploykitError as error:
            problems.append(str(error))
    return manifest, problems
