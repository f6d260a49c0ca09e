"""The report in a real browser: it draws, it fits a phone, it asks nobody for anything."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_artifact import small_artifact

from deploykit.core.artifact import Measurement
from deploykit.core.figures import milliseconds, number
from deploykit.core.manifest import Manifest, OperatorError, Source, load_manifest
from deploykit.report import write_report

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="the page is not looked at: no chromium (apt-get install chromium)"),
]
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
)  # fmt: skip
PHONE, DESK = 360, 1280
PROBE = """<!doctype html><html><body style="margin:0">
<iframe src="{source}" style="width:{width}px;height:{height}px;border:0"></iframe>
<script>
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, root = page.documentElement;
  const box = page.documentElement.clientWidth;
  const wide = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".scroll,pre,svg")
    && e.getBoundingClientRect().right > box + 1).map(e => e.tagName + "." + e.className);
  const small = [...page.querySelectorAll("p, li, td, th, dd, dt, figcaption, span, text")].map(
    e => parseFloat(getComputedStyle(e).fontSize)
      * (e.tagName == "text" ? e.getScreenCTM().a : 1));
  document.title = JSON.stringify({{
    width: frame.contentWindow.innerWidth, needs: root.scrollWidth, box, wide, height: root.scrollHeight,
    asked: frame.contentWindow.performance.getEntriesByType("resource").map(r => r.name),
    smallest: Math.min(...small), text: page.body.innerText.length,
    paper: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
    unnamed: [...page.querySelectorAll("svg")].filter(s => !s.getAttribute("aria-hidden")
      && !s.getAttribute("aria-label") && !s.querySelector("title")).length,
  }});
}};
</script></body></html>
"""


def browse(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Starts the browser with a profile of its own."""
    profile = tmp_path / "profile"
    command = [str(BROWSER), *QUIET, f"--user-data-dir={profile}", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def probe(page: Path, tmp_path: Path, width: int, *more: str) -> dict[str, Any]:
    """What the browser makes of a page in a frame of that width. Fails on anything written to the console."""
    outside = tmp_path / "outside.html"
    outside.write_text(PROBE.format(source=page.as_uri(), width=width, height=900), encoding="utf-8")
    done = browse(tmp_path, "--dump-dom", *more, outside.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stdout[:500] + done.stderr[-500:]
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


def picture(page: Path, tmp_path: Path, *more: str) -> np.ndarray:
    """A screenshot, ``[height, width, 3]``."""
    path = tmp_path / "shot.png"
    browse(tmp_path, f"--screenshot={path}", f"--window-size={DESK},3000", *more, page.as_uri())
    return np.asarray(Image.open(path).convert("RGB"))


def timed(precision: str, p50: float) -> Measurement:
    return Measurement(precision, 1, 1, 50, p50, p50 * 1.2, p50 * 2, 1000 / p50, 1.5, 1000, "this machine: CPU, rt 1.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exports with all that a page can show, long names among it, and pages of both and of each."""
    folder = tmp_path_factory.mktemp("seen")
    long = "a_very_long_name_without_any_place_to_break_it.of_a_layer.that_some_networks_have"
    changes: dict[str, Any] = {
        "model": f"{long}.py:build",
        "notes": (long * 2,),
        "data": {"calibration": Source(long, 16, "0" * 16), "eval": Source(long, 500, "1" * 16)},
        "operators": (OperatorError(long, "Conv", 0.5, 0.125, 17.75), OperatorError("head", "Gemm", 0.0, 0.0, 40.0)),
    }
    small_artifact(folder / "x86", measurements=(timed("fp32", 2.5), timed("int8", 1.25)), **changes)
    small_artifact(folder / "jetson", "jetson", **changes)
    for page in (folder / "x86", folder / "jetson", folder):
        write_report(page)
    return folder


@pytest.mark.parametrize(
    ("page", "width"),
    [("x86/report.html", PHONE), ("x86/report.html", DESK), ("jetson/report.html", PHONE), ("report.html", PHONE)],
)
def test_the_page_fits_its_width_and_asks_for_nothing(folder: Path, tmp_path: Path, page: str, width: int) -> None:
    found = probe(folder / page, tmp_path, width)
    assert found["width"] == width
    assert found["needs"] <= found["box"] and found["wide"] == [], "the page itself never scrolls sideways"
    assert found["asked"] == []
    assert found["smallest"] >= 8.5, "nothing is too small to read"
    assert found["unnamed"] == 0, "every picture has a text for those who do not see it"
    assert found["height"] > 2000 and found["text"] > 1500


def test_the_probe_notices_what_it_looks_for(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body><img src='http://nowhere.invalid/x.png'><svg></svg>"
        "<p style='width:900px;font-size:5px'>wide</p>"
    )
    found = probe(page, tmp_path, PHONE)
    assert found["needs"] > found["box"] and found["wide"] == ["P."]
    assert found["asked"] == ["http://nowhere.invalid/x.png"]
    assert found["smallest"] == 5 and found["unnamed"] == 1
    page.write_text("<!doctype html><body><script>console.error('oh')</script>")
    with pytest.raises(AssertionError, match="oh"):
        probe(page, tmp_path, PHONE)


def luminance(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    parts = np.array([int(v) for v in re.findall(r"\d+", color)[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_follow_the_reader(folder: Path, tmp_path: Path, dark: bool) -> None:
    found = probe(
        folder / "x86/report.html", tmp_path, DESK, f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    )
    paper, ink = luminance(found["paper"]), luminance(found["ink"])
    assert (paper < ink) == dark
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7, "WCAG's AAA contrast"


@pytest.mark.parametrize(("page", "dark"), [("x86/report.html", True), ("report.html", False)])
def test_the_page_is_drawn(folder: Path, tmp_path: Path, page: str, dark: bool) -> None:
    shot = picture(folder / page, tmp_path, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert shot.shape == (3000, DESK, 3)
    assert shot.std() > 10, "not blank"
    coloured = (np.ptp(shot.astype(int), axis=2) > 60).mean()
    assert coloured > 0.0002, "bars and points are there"
    inked = (np.abs(shot.astype(int) - shot[0, 0]).sum(axis=2) > 60).mean(axis=1)
    assert (inked > 0).mean() > 0.2, "text down the page"


def figures(manifest: Manifest) -> list[str]:
    """What a reader must find."""
    scores = [number(s.metric) for s in manifest.scores] + [number(s.agreement) for s in manifest.scores[1:]]
    times = [milliseconds(v) for m in manifest.measurements for v in (m.p50_ms, m.p90_ms, m.p99_ms) if v is not None]
    errors = [f"{o.sqnr_db:.1f} dB" for o in manifest.operators]
    return [*scores, *times, *errors, *(f"{s.bytes:,}" for s in manifest.stored)]


def test_the_browser_shows_the_manifests_figures(folder: Path, tmp_path: Path) -> None:
    done = browse(tmp_path, "--dump-dom", (folder / "x86" / "report.html").as_uri())
    text = " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", done.stdout, flags=re.DOTALL)).split())
    manifest = load_manifest(folder / "x86")
    assert len(figures(manifest)) >= 10
    for figure in figures(manifest):
        assert figure in text, figure
    assert manifest.model in text and "None" not in text
