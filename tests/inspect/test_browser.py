"""The page in a real browser, without a network: Chromium, headless. Skipped where there is none."""

import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from PIL import Image

from eah.inspect import look, one, overview
from eah.inspect.calibrate import calibrate, candidates, command
from eah.inspect.compare import compare
from eah.inspect.many import record_of, thresholds_around

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
NO_NETWORK = ("--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND")
ASK = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  parent.postMessage(JSON.stringify({
    images: FOUND, width: innerWidth, scroll: SCROLL, loaded: performance.getEntriesByType("resource").map(e => e.name),
    dark: matchMedia("(prefers-color-scheme: dark)").matches, ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color}), "*");
})</script>"""
# Chromium's own window is at least 500 pixels wide; a frame is as narrow as a phone.
FRAME = """<style>body { margin: 0 } iframe { border: 0; width: WIDTHpx; height: 2000px }</style>
<iframe src="URL"></iframe>
<script>addEventListener("message", event => document.body.replaceChildren(event.data))</script>"""
FOUND = "[...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.alt, i.getBoundingClientRect().right])"
ASK = ASK.replace("FOUND", FOUND).replace("SCROLL", "document.documentElement.scrollWidth")


@pytest.fixture(scope="module", params=["one", "many"])
def page(tiny, tmp_path_factory, request):
    """The page of one picture, compared, and that of many, calibrated."""
    out, picture = tmp_path_factory.mktemp("page"), Image.linear_gradient("L").convert("RGB").resize((60, 40))
    seen = look(*tiny, picture, "What is in the picture?", threshold=0.05)
    if request.param == "one":
        compared = compare(*tiny, seen, max_new_tokens=4)
        return one.write(seen, out, {"model": "tiny", "image": "gradient.png"}, [0, 1], compared)
    thresholds = thresholds_around(seen)
    record = {"image": "0.png", **record_of(seen, [0.05, *thresholds])}
    cells = calibrate([record, record], thresholds)
    chosen = [{**cell, "kl": {"median": 0.1, "largest": 0.2, "pictures": 2}} for cell in candidates(cells)]
    calibration = {"cells": cells, "candidates": chosen, "commands": [command("m", "i", cell) for cell in chosen]}
    names = {"model": "tiny", "images": "folder", "prompt": "What?", "threshold": 0.05}
    return overview.write([record, record], names, out, 4, ("base", {"0.png": 0.5}), calibration)


def framed(page, width, folder):
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("URL", page.as_uri()).replace("WIDTH", str(width)))
    return frame.as_uri()


def chromium(*arguments, folder):
    """What it prints. A profile of its own: tests may run at the same time."""
    common = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile")
    command = [CHROMIUM, *common, *NO_NETWORK, "--virtual-time-budget=5000", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width, dark", [(1200, False), (390, True)])
def test_every_picture_is_shown_and_nothing_is_wider_than_the_screen(page, tmp_path, width, dark):
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text().replace("</head>", f"{ASK}</head>"))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    printed = chromium(
        *scheme, "--window-size=1200,900", "--dump-dom", framed(asking, width, tmp_path), folder=tmp_path
    )
    found = json.loads(re.search(r"<body>(\{.*\})</body>", printed)[1].replace("&amp;", "&"))
    assert found["width"] == width and found["scroll"] <= width and found["dark"] == dark
    assert found["loaded"] == [], "the page loads something"
    assert len(found["images"]) == page.read_text().count("<img ") >= 5
    for natural_width, natural_height, alt, _ in found["images"]:
        assert natural_width > 20 and natural_height > 20 and alt
    ground, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) / 3 for name in ("ground", "ink"))
    assert (ground < 40 and ink > 200) if dark else (ground > 240 and ink < 60)


def test_it_prints_with_the_pictures_that_are_folded_away(page, tmp_path):
    path = tmp_path / "page.pdf"
    chromium(f"--print-to-pdf={path}", page.as_uri(), folder=tmp_path)
    content = path.read_bytes()
    assert content.startswith(b"%PDF")
    printed, images = len(re.findall(rb"/Subtype /Image\b", content)), page.read_text().count("<img ")
    different = len(set(re.findall(r'src="([^"]+)"', page.read_text())))
    assert printed >= different > images / 2


def test_its_screenshot_is_not_blank(page, tmp_path):
    path = tmp_path / "shot.png"
    chromium(f"--screenshot={path}", "--window-size=500,2000", framed(page, 390, tmp_path), folder=tmp_path)
    with Image.open(path) as shot:
        assert shot.size == (500, 2000) and len(shot.convert("RGB").quantize(64).getcolors()) > 30
