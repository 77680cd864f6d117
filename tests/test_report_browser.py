"""The page of `distaya demo` in a real browser: it asks for nothing, nothing goes wrong, and it can
be read on a telephone, in the dark, and from right to left.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from report_case import evaluation, fill

from distaya_ext.report import write_pages

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
QUIET = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
    "disable-dev-shm-usage", "hide-scrollbars",
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="no Chromium with a chromedriver is installed, so no page was opened in a browser",
)

# Every piece of text with the colours it is drawn in, as far as they are seen.
CONTRASTS = """
const light = c => { const f = c.match(/[\\d.]+/g).map(Number);
  const [r, g, b] = f.slice(0, 3).map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 });
  return {l: 0.2126 * r + 0.7152 * g + 0.0722 * b, a: f.length > 3 ? f[3] : 1} };
const behind = e => { for (; e; e = e.parentElement) {
    const c = light(getComputedStyle(e).backgroundColor);
    if (c.a > 0) return c.l } return 1 };
const found = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  if (!own || ['title', 'desc', 'style'].includes(e.tagName)) continue;
  const style = getComputedStyle(e);
  const ink = light(e instanceof SVGElement ? style.fill : style.color), paper = behind(e);
  const [high, low] = ink.l > paper ? [ink.l, paper] : [paper, ink.l];
  found.push([(high + 0.05) / (low + 0.05), e.textContent.trim().slice(0, 40)]);
}
return found
"""


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """What `distaya demo --quick` writes: the folder of its model."""
    out = tmp_path_factory.mktemp("demo") / "kept"
    code = "from distaya_ext.cli.app import main; main()"
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "DISTAYA_HISTORY": "off"}
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--quick", "--quiet", "--out", str(out)],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = out / "half" / "report.html"
    assert str(page) in done.stdout.replace("\n", "")
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium with a profile of its own, which writes down what it asks for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*QUIET, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show(browser, page: Path, width: int = 1200, scheme: str = "light") -> None:
    """Open a page, with the logs of earlier ones thrown away."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_ = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme_})
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())


def asked(browser) -> list[str]:
    """The addresses that the page asked for, itself left out."""
    said = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    sent = [one["params"] for one in said if one["method"] == "Network.requestWillBeSent"]
    own = [p["request"]["url"] for p in sent if p["request"]["url"] == p["documentURL"]]
    assert len(own) == 1, "the log of the browser is not what this test thinks"
    return [p["request"]["url"] for p in sent if p["request"]["url"] != p["documentURL"]]


def picture(browser, height: int = 900):
    """What is seen, as an array [height, width, 3]."""
    import numpy as np
    from PIL import Image

    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))


def test_the_page_of_the_demo_asks_for_nothing(browser, demo):
    """Must hold for every reader: no request, no line on the console."""
    show(browser, demo)
    assert "nano-aya" in browser.title
    assert asked(browser) == []
    assert browser.get_log("browser") == []


def test_the_logs_would_tell(browser, tmp_path):
    """A page that loads something and runs a script does leave its marks in those logs."""
    (tmp_path / "style.css").write_text("body { color: red }")
    page = tmp_path / "page.html"
    page.write_text('<link rel=stylesheet href=style.css><script>console.error("here")</script>')
    show(browser, page)
    assert [url.rpartition("/")[2] for url in asked(browser)] == ["style.css"]
    assert any("here" in line["message"] for line in browser.get_log("browser"))


def test_a_hostile_page_runs_nothing(browser, tmp_path):
    """Texts that would be scripts or pictures elsewhere: nothing runs, nothing is fetched."""
    fetch = '<img src="http://127.0.0.1:9/x" onerror=alert(1)>'
    evil = f'<script>document.title="taken"</script>{fetch}'
    folder = fill(tmp_path / "out")
    told = evaluation(base=evil, notes=[evil])
    told["samples"] = [{"language": "ar", "prompt": evil, "base": evil + "a", "model": evil + "b"}]
    (folder / "evaluation.json").write_text(json.dumps({"steps": {evil: told}, "gate": evil}))
    show(browser, write_pages(folder)[0])
    assert "taken" not in browser.title and "aya" in browser.title
    assert asked(browser) == [] and browser.get_log("browser") == []
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_can_be_read(browser, demo, width, scheme):
    """The page never scrolls sideways, tables do in their own box; text is clear from its paper."""
    show(browser, demo, width, scheme)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    beyond = browser.execute_script(
        """return [...document.querySelectorAll('svg.plot text, p, h1, h2, li, dd')].filter(e => {
             const box = e.getBoundingClientRect();
             const out = box.right > innerWidth + 1 || box.left < -1;
             return !e.closest('.wide') && box.width && out
           }).map(e => e.textContent.slice(0, 60))"""
    )
    assert beyond == []
    small = browser.execute_script(
        """return [...document.querySelectorAll('body *')].filter(e => e.textContent.trim()
             && parseFloat(getComputedStyle(e).fontSize) < 11).length"""
    )
    assert small == 0
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 300
    assert min(contrasts)[0] >= 4.5, min(contrasts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_seen(browser, demo, scheme):
    """Paper of the scheme's colour, ink on it, and more than one colour in the plots."""
    show(browser, demo, 1200, scheme)
    seen = picture(browser)
    paper = seen[5, 5].mean()
    assert paper > 240 if scheme == "light" else paper < 40
    ink = abs(seen.astype(int) - seen[5, 5]).max(axis=2) > 60
    assert 0.01 < ink.mean() < 0.5
    browser.execute_script("document.querySelector('svg.plot').scrollIntoView()")
    seen = picture(browser).astype(int)
    coloured = (seen.max(axis=2) - seen.min(axis=2)) > 80
    assert coloured.sum() > 200


def test_right_to_left_is_shown_right(browser, demo):
    """Samples in Arabic, Hebrew and Persian run from right to left, others do not."""
    show(browser, demo, 360)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    said = browser.execute_script(
        """return [...document.querySelectorAll('#samples .said')].map(e => {
             const style = getComputedStyle(e);
             return [e.lang, style.direction, style.unicodeBidi, e.textContent]
           })"""
    )
    directions = {lang: direction for lang, direction, *_ in said}
    rtl = {lang for lang, direction in directions.items() if direction == "rtl"}
    assert rtl == {"ar", "he", "fa"} and len(directions) == 23
    assert all(isolation == "isolate" for _, _, isolation, _ in said)
    edge = browser.execute_script(
        """const e = document.querySelector('#samples .said[lang=ar]');
           const r = document.createRange(); r.setStart(e.firstChild, 0); r.setEnd(e.firstChild, 1);
           return [r.getBoundingClientRect().right, e.getBoundingClientRect().right]"""
    )
    assert edge[0] == pytest.approx(edge[1], abs=3)  # the first letter stands at the right edge
