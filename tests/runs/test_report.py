"""``flowdppo report``: one page that holds what it shows, of a run that goes on or has ended, in a real browser too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from flowdppo_fast.cli import main
from flowdppo_fast.runs.report import report_of, write_report
from flowdppo_fast.runs.tracking import RunLog

FELL = Path(__file__).parent / "logged" / "fell"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture
def folder(tmp_path):
    """The logs of a run whose reward fell, with images, hostile prompts and a resume."""
    run = tmp_path / "run"
    shutil.copytree(FELL, run)
    log = RunLog(Accelerator(cpu=True), run, progress=False)
    for iteration in (1, 5, 9):
        images = torch.full((2, 3, 16, 16), iteration / 10)
        log.images("rollout", iteration, images, [f"a <b>fox</b>\nreward 0.{iteration}", "cat\nreward 0.5"])
    log.images("eval", 9, torch.zeros(1, 3, 16, 16), ["fish\nreward 0.1"])
    changed = {"iteration": 4, "changed": {"optimizer.learning_rate": [0.001, "<script>alert(1)</script>"]}}
    (run / "changes.jsonl").write_text(json.dumps(changed) + "\n")
    return run


class Seen(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data

    def all(self, name: str) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag == name]


def test_the_page_has_everything_and_asks_no_network(folder):
    page = report_of(folder)
    seen = Seen(page)
    assert "reward falls" in seen.words
    assert "dotted: the bound" in seen.words
    assert len([line for line in seen.all("line") if line.get("class") == "bound"]) == 1
    # a mark in each curve where the run was continued
    assert len([line for line in seen.all("line") if line.get("class") == "change"]) == len(seen.all("figure"))
    assert len(seen.all("figure")) >= 3
    assert [image["data-iteration"] for image in seen.all("img")] == ["9", "1", "5", "9"]
    assert [image["alt"] for image in seen.all("img") if "hidden" not in image] == ["eval 9", "rollout 9"]
    assert len(seen.all("input")) == 2
    assert "optimizer.learning_rate" in seen.words
    assert "dropped, advantage > 0" in seen.words
    sources = [attrs[key] for _, attrs in seen.tags for key in ("src", "href") if key in attrs]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", page)
    # what a run logs cannot become markup
    assert len(seen.all("script")) == 1
    assert "<script>alert" not in page


def test_a_run_that_goes_on_and_one_without_rows_or_images_have_a_page(folder):
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"iteration": 99, "rew')
    shutil.rmtree(folder / "images")
    (folder / "rows.jsonl").unlink()
    (folder / "changes.jsonl").unlink()
    seen = Seen(report_of(folder))
    assert "The run has no row log" in seen.words
    assert "iteration 99" not in seen.words
    assert not seen.all("img")
    assert seen.all("polyline")


def test_numbers_that_cannot_be_drawn_are_gaps(folder):
    lines = [{"iteration": 1, "reward": 0.5, "kl_new_old_nats": 0.0}, {"iteration": 2, "reward": "NaN"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report_of(folder)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page))
    assert not re.search("nan|inf", drawn)
    assert len(Seen(page).all("polyline")) == 1


def test_many_pages_of_images_leave_a_page_that_can_be_opened(folder):
    own = next((folder / "images").glob("rollout-*.png"))
    for iteration in range(10, 200):
        shutil.copy(own, folder / "images" / f"rollout-{iteration:06d}.png")
    shown = [int(i["data-iteration"]) for i in Seen(report_of(folder)).all("img") if i["alt"].startswith("rollout")]
    assert (len(shown), shown[0], shown[-1]) == (24, 1, 199)
    assert shown == sorted(set(shown))


def test_the_command_and_what_is_no_run(folder, tmp_path, capsys):
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == report_of(folder)
    assert not (folder / "report.html").exists()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "no config.yaml there, expected a run folder" in capsys.readouterr().out


def test_a_run_leaves_its_report(tmp_path, folder):
    (folder / "metrics.jsonl").unlink()
    log = RunLog(Accelerator(cpu=True), folder, progress=False, plot_every=2)
    log.start()
    log.iteration({"iteration": 1, "reward": 0.25})
    assert not (folder / "report.html").exists()
    log.iteration({"iteration": 2, "reward": 0.75})
    assert "iteration 2" in (folder / "report.html").read_text()
    # a log that is damaged costs the page and not the run
    (folder / "report.html").unlink()
    (folder / "rows.jsonl").write_text("{}\n")
    log.iteration({"iteration": 3, "reward": 0.5})
    log.iteration({"iteration": 4, "reward": 0.5})
    assert not (folder / "report.html").exists()
    log.close()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")
def test_a_browser_shows_it_and_its_slider(folder, tmp_path):
    page = write_report(folder)
    moved = tmp_path / "moved.html"
    check = """<script>
    const range = [...document.querySelectorAll("input")].at(-1)
    range.value = 0; range.dispatchEvent(new Event("input"))
    const said = document.createElement("pre"); said.id = "said"
    const shown = [...document.querySelectorAll("img")].filter(i => !i.hidden)
    Promise.all(shown.map(i => i.decode())).then(() => {
      said.textContent = JSON.stringify(shown.map(i => [i.alt, i.naturalWidth > 100]))
      document.body.append(said) })
    </script></html>"""
    moved.write_text(page.read_text().replace("</html>", check))
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def start(*options: str) -> str:
        done = subprocess.run([*browser, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    dom = start("--virtual-time-budget=3000", "--dump-dom", moved.as_uri())
    said = re.search(r'<pre id="said">(.*?)</pre>', dom)
    assert said, dom[-500:]
    assert json.loads(said[1]) == [["eval 9", True], ["rollout 1", True]]
    assert "<output>1</output>" in dom
    picture = tmp_path / "page.png"
    start("--window-size=1100,2400", f"--screenshot={picture}", page.as_uri())
    # drawn, with more than a few colours
    assert len(Image.open(picture).convert("RGB").getcolors(1 << 24)) > 50
