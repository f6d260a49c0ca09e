"""One artifact's page: a colleague understands it without the person who made the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploykit import targets
from deploykit.calibration.growth import convergence
from deploykit.core.artifact import File, Measurement
from deploykit.core.device import Facts
from deploykit.core.figures import file_size, milliseconds, number, quotient
from deploykit.core.manifest import Manifest, Score
from deploykit.core.precision import is_integer
from deploykit.report import findings, spans
from deploykit.report.advice import advice
from deploykit.report.cards import cards
from deploykit.report.growth import growth
from deploykit.report.html import fill
from deploykit.report.layers import grouped, maps
from deploykit.report.made import Made
from deploykit.report.ports import ports
from deploykit.report.rows import ORIGINAL, Row, place, reason, rows
from deploykit.report.usage import integers_only, usage
from deploykit.report.words import decibels, preprocessing


def render(made: Made) -> str:
    """The page. Equal artifacts give equal bytes."""
    m, ranges = made.manifest, made.ranges
    found = rows(m)
    shown = () if ranges is None else spans.spans(ranges, m)
    return fill(
        "artifact.html.j2",
        m=m,
        device=targets.load(m.target).title if m.target in targets.names() else "",
        verdict=verdict(m),
        summary=summary(found),
        cards=cards(m),
        advice=advice(m, ranges),
        rows=found,
        places=places(m.measurements),
        usage=usage(m),
        road=road(m),
        facts=facts,
        counts={f.path: _counts(f) for f in m.files if f.quantized},
        maps=maps(m),
        integers_only=integers_only(m.exporter),
        unmeasured=next((c.detail for c in m.checks if c.name == "operators" and c.passed is None), ""),
        islands={f.path: grouped(f.islands) for f in m.files if f.islands},
        spans=shown,
        findings=findings.shown((*m.findings, *growth(None if ranges is None else convergence(ranges)))),
        tensors=0 if ranges is None else len(spans.computed(ranges, m)),
        histograms=any(s.outline for s in shown),
        checks=[("", c) for c in m.checks],
        preprocessing=preprocessing(m.preprocess, m.inputs[0].dtype) if m.preprocess else (),
        ports=ports(m),
    )


@dataclass(frozen=True)
class Verdict:
    """The checks in a few words: ``passed``, ``failed`` or ``open``."""

    state: str
    text: str


def verdict(manifest: Manifest) -> Verdict:
    """What all checks together say. Checks that could not run are never counted as passed."""
    failed = sum(c.passed is False for c in manifest.checks)
    passed = sum(c.passed is True for c in manifest.checks)
    missing = len(manifest.checks) - failed - passed
    rest = f", {missing} could not run here" if missing else ""
    if failed:
        return Verdict("failed", f"{failed} of {len(manifest.checks)} checks failed{rest}")
    if passed:
        return Verdict("passed", f"{passed} check{'s' if passed > 1 else ''} passed{rest}")
    return Verdict("open", "nothing was checked")


def summary(found: Sequence[Row]) -> tuple[str, ...]:
    """What the most compressed file is, beside the baseline, in sentences. Only what was measured is said."""
    files = [r for r in found if r.file is not None]
    if not files:
        return ()
    base, last = files[0], files[-1]
    sentences = []
    if last.file is not None and last.file.read_instead:
        sentences.append(
            f"The device makes its {last.precision} engine from {last.file.read_instead}: it cannot read "
            f"{last.file.path}, which shows what {last.precision} costs."
        )
    elif last is not base and last.size is not None:
        sentences.append(
            f"The {last.precision} file has {file_size(last.bytes)}, {quotient(last.size)} the {base.precision} file."
        )
    a, b = last.measurement, base.measurement
    if a is not None and a.p50_ms is not None:
        beside = ""
        if b is not None and b.p50_ms and last is not base:
            beside = f" instead of {milliseconds(b.p50_ms)} ms ({quotient(a.p50_ms / b.p50_ms)})"
        machine = a.where.partition(":")[0]
        sentences.append(f"One call takes {milliseconds(a.p50_ms)} ms{beside} on {machine}.")
    elif a is not None:
        sentences.append(f"Its speed was not measured: {reason(a.where)}.")
    sentences += _accuracy(found[0].score if found[0].precision == ORIGINAL else None, last.score)
    return tuple(sentences)


def _accuracy(original: Score | None, score: Score | None) -> list[str]:
    if score is None:
        return ["Its accuracy was not measured."]
    where = f"on {score.samples:,} samples ({score.data})"
    said = []
    if score.metric is not None:
        beside = f", the original model {number(original.metric)} %" if original and original.metric is not None else ""
        said.append(f"It scores {number(score.metric)} %{beside}, {where}.")
    if score.agreement is not None:
        of = "them" if said else f"{score.samples:,} samples ({score.data})"
        said.append(f"It gives the original model's answer for {number(score.agreement)} % of {of}.")
    if not said and score.sqnr_db:
        name, worst = min(score.sqnr_db.items(), key=lambda item: item[1])
        equal = f"Its outputs equal the original model's, {where}."
        noisy = f"Its outputs stand at least {decibels(worst)} above the error ({name}), {where}."
        said.append(equal if decibels(worst) == "equal" else noisy)
    return said


def how(m: Measurement) -> str:
    """Where and how a time was taken."""
    if not m.runs:
        return place(m.where)
    return f"{m.where}, batch {m.batch}, {m.threads} thread{'s' if m.threads != 1 else ''}, {m.runs} runs"


def places(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """Every distinct place and way of measuring."""
    return tuple(dict.fromkeys(how(m) for m in measurements))


@dataclass(frozen=True)
class Done:
    """One station of the road from the model to the files."""

    what: str
    said: str
    code: tuple[str, ...] = ()
    seconds: float | None = None


def road(m: Manifest) -> tuple[Done, ...]:
    """What was done, in order."""
    seconds = m.seconds
    done = [Done("lowered", f"to a float graph, hash {m.graph}, from", (m.model,), seconds.get("lower"))]
    if "calibration" in m.data:
        data = m.data["calibration"]
        said = f"ranges on {data.samples:,} samples of {data.origin}, thresholds by {m.thresholds}"
        done.append(Done("calibrated", said, (), seconds.get("calibrate")))
    if m.steps:
        spent = sum(v for k, v in seconds.items() if k.split()[0] in {s.partition("(")[0] for s in m.steps})
        done.append(Done("changed", "in this order:", _steps(m), spent + seconds.get("compress", 0.0)))
    names = tuple(f.path for f in m.files)
    done.append(Done("written", f"by the {m.exporter} exporter:", names, seconds.get(f"write {m.target}")))
    if m.checks:
        done.append(Done("checked", f"{verdict(m).text}", (), seconds.get(f"check {m.target}")))
    timed = [t for t in m.measurements if t.runs]
    if timed:
        done.append(Done("timed", "; ".join(places(timed)), (), seconds.get(f"benchmark {m.target}")))
    return tuple(done)


def _steps(m: Manifest) -> tuple[str, ...]:
    """The steps; behind hub steps that only some integer files went through, which these are."""
    whose = {step: [f.precision for f in m.files if step in f.steps] for step in m.steps}
    every = [f.precision for f in m.files if is_integer(f.precision)]
    return tuple(
        f"{step} for {', '.join(files)}" if files and files != every else step for step, files in whose.items()
    )


def facts(device: Facts) -> tuple[tuple[str, str], ...]:
    """What a device said about itself, in words; what it did not say is left out."""
    clock = f"{device.clock_mhz:.0f} MHz" if device.clock_mhz else ""
    if device.clock_max_mhz:
        clock = f"{clock} of at most {device.clock_max_mhz:.0f} MHz".removeprefix(" of ")
    said = {
        "device": f"{device.name} ({device.address})",
        "board": device.board,
        "processor": f"{f'{device.cores} × ' if device.cores else ''}{device.cpu or device.machine}",
        "clock": clock,
        "governor": device.governor,
        "power mode": device.power_mode,
        "temperatures": ", ".join(f"{zone} {degrees:.0f} °C" for zone, degrees in device.temperatures.items()),
        "memory": f"{device.memory_mb:,.0f} MB" if device.memory_mb else "",
        "system": device.system,
        "packages": ", ".join(f"{name} {version}" for name, version in device.packages.items()),
    }
    return tuple((name, fact) for name, fact in said.items() if fact)


def _counts(file: File) -> str:
    """How many operators of each kind compute in what."""
    counts = ", ".join(f"{n} {kind}" for kind, n in file.quantized.items())
    return f"{'integers' if is_integer(file.precision) else file.precision}: {counts}"
