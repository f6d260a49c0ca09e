"""How to run an artifact: `infer.py` and `README.md` beside its files. Neither needs deploykit, nor holds a timing."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from pprint import pformat
from types import SimpleNamespace
from typing import Any

from deploykit import exporters, targets
from deploykit.core.errors import unknown
from deploykit.core.figures import file_size, number
from deploykit.core.manifest import Manifest, Score
from deploykit.report.ports import ports
from deploykit.report.words import decibels, named, preprocessing, shape, title

PARTS = "deploykit.report.infer"
OLDEST_PYTHON = (3, 7)
"""Which infer.py needs."""
BENCHMARK = "deploykit benchmark .   # time them on this machine"


@dataclass(frozen=True)
class Usage:
    """How the files of an exporter are run."""

    commands: tuple[str, ...]
    about: str


def write_usage(folder: Path, manifest: Manifest) -> None:
    """Writes ``README.md`` and, where a script on any machine can run the files, ``infer.py``.

    Args:
        folder: where the manifest's files lie already.
        manifest: need not be saved yet. The same manifest and files give the same bytes.
    """
    runtime = _runtime(manifest.exporter)
    if hasattr(runtime, "open_model"):
        (folder / "infer.py").write_text(_script(folder, manifest, runtime), encoding="utf-8")
    (folder / "README.md").write_text(_readme(folder, manifest), encoding="utf-8")


def usage(manifest: Manifest) -> Usage:
    """The commands that run an artifact, and a sentence about them."""
    runtime = _runtime(manifest.exporter)
    if not hasattr(runtime, "open_model"):
        return Usage(tuple(runtime.COMMANDS), runtime.ABOUT)
    images = manifest.preprocess is not None
    packages = ["numpy", *runtime.PACKAGES, *(["pillow"] if images else [])]
    python = _python(manifest.target, getattr(runtime, "PYTHON", "python"))
    commands = (
        *python.first,
        f"{python.pip} install {' '.join(packages)}",
        f"{python.command} infer.py {'image.jpg' if images else 'inputs.npz'}",
    )
    if hasattr(runtime, "ABOUT"):  # there is something to do first
        return Usage((*runtime.COMMANDS, *commands), f"{runtime.ABOUT}{python.why}")
    precisions = [f.precision for f in manifest.files]
    about = "`infer.py` needs nothing else from here: copy its preprocessing and the few lines around the runtime."
    if len(precisions) > 1:
        about = f"It runs the {precisions[-1]} file; `--precision {precisions[0]}` runs another. {about}"
    return Usage(commands, about)


@dataclass(frozen=True)
class _Python:
    """What runs ``infer.py`` on a device."""

    command: str
    pip: str
    first: tuple[str, ...] = ()
    """What installs it."""
    why: str = ""


def _python(target: str, usual: str) -> _Python:
    """The device's own Python; where the target says that it is too old, a newer one beside it."""
    facts = targets.load(target).facts if target in targets.names() else {}
    own, newer = facts.get("python"), facts.get("newer_python")
    if own is None or newer is None or tuple(map(int, str(own.value).split("."))) >= OLDEST_PYTHON:
        return _Python(usual, "pip" if usual == "python" else f"{usual} -m pip")
    python = f"python{newer.value}"
    return _Python(
        "env/bin/python",
        "env/bin/pip",
        (f"sudo apt install {python} {python}-venv", f"{python} -m venv env", "env/bin/pip install --upgrade pip"),
        f" This device's own Python is too old for it ({own.source}), so it gets {python} beside it.",
    )


def integers_only(exporter: str) -> bool:
    """Whether nothing may stay in float in what an exporter writes."""
    return bool(getattr(_runtime(exporter), "INTEGERS_ONLY", False))


def _runtime(exporter: str) -> Any:
    if exporter not in exporters.names():
        raise unknown("exporter", exporter, exporters.names())
    try:
        return importlib.import_module(f"{PARTS}.run_{exporter}")
    except ModuleNotFoundError:  # an exporter of the user's: the files speak for themselves
        return SimpleNamespace(COMMANDS=(), ABOUT="Open the files in the runtime they were written for.")


def _script(folder: Path, manifest: Manifest, runtime: Any) -> str:
    settings: dict[str, object] = {
        "FILES": {f.precision: f.path for f in manifest.files},
        "INPUTS": {s.name: (named(s.shape), s.dtype) for s in manifest.inputs},
        "CLASSES": manifest.classes,
        "PREPROCESS": _settled(manifest),
    }
    if hasattr(runtime, "settings"):
        settings |= runtime.settings(folder, manifest.files)
    script = _source("script.py")
    constants = "\n".join(f"{name} = {pformat(value, width=110, sort_dicts=False)}" for name, value in settings.items())
    script = _replace(script, "settings", constants)
    script = _replace(script, "runtime", _region(_source(f"run_{manifest.exporter}.py"), "runtime"))
    commands = usage(manifest).commands
    about = f"Runs {title(manifest.model)}, exported for {manifest.target}:\n\n    " + "\n    ".join(commands)
    return script.replace('"""ABOUT"""', f"{about!r}" if '"""' in about or "\\" in about else f'"""{about}\n"""', 1)


def _settled(manifest: Manifest) -> dict[str, object] | None:
    """The preprocessing as plain values, the crop as (height, width)."""
    steps = manifest.preprocess
    if steps is None:
        return None
    crop = (steps.crop, steps.crop) if isinstance(steps.crop, int) else steps.crop
    return {
        "resize": steps.resize,
        "crop": crop,
        "scale": steps.scale,
        "mean": steps.mean,
        "std": steps.std,
        "layout": steps.layout,
        "channels": steps.channels,
    }


def _source(name: str) -> str:
    return (resources.files(PARTS) / name).read_text(encoding="utf-8")


def _region(source: str, name: str) -> str:
    return source.partition(f"# region {name}\n")[2].partition("# endregion")[0].strip("\n")


def _replace(source: str, name: str, content: str) -> str:
    """Puts the content in place of a region and of its two marks."""
    before, _, rest = source.partition(f"# region {name}\n")
    return f"{before}{content}\n{rest.partition('# endregion')[2].removeprefix(chr(10))}"


def _readme(folder: Path, manifest: Manifest) -> str:
    how = usage(manifest)
    version = f" {manifest.versions['deploykit']}" if "deploykit" in manifest.versions else ""
    lines = [
        f"# {title(manifest.model)} for {manifest.target}",
        "",
        f"Files for one device, made from `{manifest.model}` by deploykit{version}.",
        "",
        "| file | precision | size | quantized operators |",
        "|---|---|---|---|",
    ]
    for file in manifest.files:
        counts = ", ".join(f"{n} {kind}" for kind, n in file.quantized.items()) or "none"
        size = file_size(file.size(folder))
        lines.append(f"| `{file.path}` | {file.precision} | {size} | {counts} |")
    lines += ["", "## Run it", "", *(f"    {command}" for command in how.commands), "", how.about, ""]
    scripted = hasattr(_runtime(manifest.exporter), "open_model")
    fed = [] if scripted else _stored(manifest, "What goes in and comes out")  # by the user, so it comes first
    lines += [*fed, *([""] if fed else [])]
    lines += ["## What goes in" if not fed else "## What the model takes", ""]
    lines += [f"- `{s.name}`: {shape(s.shape)}, {s.dtype}" for s in manifest.inputs]
    if manifest.preprocess is not None:
        lines += ["", "An image becomes that by these steps, which are part of the model's contract:", ""]
        lines += [
            f"{i}. {step}" for i, step in enumerate(preprocessing(manifest.preprocess, manifest.inputs[0].dtype), 1)
        ]
    elif scripted:
        arrays = ", ".join(f"{s.name}={s.name}" for s in manifest.inputs)
        lines += ["", f'`inputs.npz` holds them by name: `numpy.savez("inputs.npz", {arrays})`.']
    lines += ["", "## What comes out" if not fed else "## What it gives", ""]
    lines += [f"- `{s.name}`: {shape(s.shape)}, {s.dtype}" for s in manifest.outputs]
    if manifest.classes:
        lines += ["", "Classes, in order: " + ", ".join(manifest.classes) + "."]
    stored = _stored(manifest, "What the files hold") if scripted else []
    lines += [*([""] if stored else []), *stored]
    notes = [*manifest.notes, *(note for file in manifest.files for note in file.notes)]
    if notes:
        lines += ["", "## Good to know", "", *(f"- {note}" for note in dict.fromkeys(notes))]
    lines += [
        "",
        "## How good it is",
        "",
        *_scores(folder, manifest),
        "`manifest.json` holds all checks, timings, the recipe and every version. Where deploykit is installed:",
        "",
        "    deploykit verify .      # are these the files that were checked?",
        "    deploykit report .      # report.html, to read and to hand on",
    ]
    timing = getattr(_runtime(manifest.exporter), "TIMING", BENCHMARK)
    lines += [*([f"    {timing}"] if timing else []), ""]
    return "\n".join(lines)


def _stored(manifest: Manifest, heading: str) -> list[str]:
    """What the files' own inputs and outputs are, where they are not the model's."""
    found = ports(manifest)
    if not found:
        return []
    by_script = " `infer.py` does all that." if hasattr(_runtime(manifest.exporter), "open_model") else ""
    lines = [
        f"## {heading}",
        "",
        "Whoever feeds a file directly gives and gets this; where there is a scale, integers stand for "
        f"scale × (integer − zero point).{by_script}",
        "",
        "| | name | shape | type | scale | zero point | files |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in found:
        files = ", ".join(f"`{file}`" for file in p.files)
        lines.append(f"| {p.way} | `{p.name}` | {p.shape} | {p.dtype} | {p.scale} | {p.zero_point} | {files} |")
    return lines


def _scores(folder: Path, manifest: Manifest) -> list[str]:
    """Accuracy, agreement and size of every file, beside the original model."""
    if not manifest.scores:
        return ["It was not evaluated: there was no evaluation data.", ""]
    sizes: dict[str, tuple[str, str]] = {
        f.precision: (f"`{f.path}`", file_size(f.size(folder))) for f in manifest.files
    }
    lines = ["| | accuracy % | same answer % | signal to noise dB | size |", "|---|---|---|---|---|"]
    for score in manifest.scores:
        what, size = sizes.get(score.precision, ("the original model", ""))
        agreement, noise = ("", "") if not size else (number(score.agreement), _worst(score))
        lines.append(f"| {what} | {number(score.metric)} | {agreement} | {noise} | {size} |")
    first = manifest.scores[0]
    return [*lines, "", f"On {first.samples:,} samples: {first.data}. Answers and noise are against the original.", ""]


def _worst(score: Score) -> str:
    return decibels(min(score.sqnr_db.values(), default=None)).removesuffix(" dB")
