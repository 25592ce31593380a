"""Pages: what is in the file, and what a browser makes of it, if one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_dhellam.plan import Lane
from lightning_dhellam.search.report.page import (
    Page,
    advice_page,
    prediction_page,
    save_page,
    values,
)
from lightning_dhellam.search.report.page.values import view_of
from tests.search.pages import WEIRD, advice, findings, many, prediction

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    findings().write(folder)
    save_page(folder / "prediction.html", prediction_page(prediction()))
    save_page(folder / "advice.html", advice_page(advice()))
    save_page(folder / "empty.html", Page("Nothing"))
    names = ("report", "prediction", "advice", "empty")
    return {name: folder / f"{name}.html" for name in names}


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the element that holds the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def data_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Elements(file.read_text()).data)
    return found


@pytest.mark.parametrize("name", ["report", "prediction", "advice", "empty"])
def test_a_page_is_whole_and_asks_for_nothing_else(files: dict[str, Path], name: str) -> None:
    text = files[name].read_text()
    page = Elements(text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not {"src", "href"} & {key for tag, found in page.tags if tag != "link" for key in found}
    assert [found["href"] for tag, found in page.tags if tag == "link"] == ["data:,"]
    style_and_script = text.replace("http://www.w3.org/2000/svg", "").replace(page.data, "")
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|import\(|{{", style_and_script)
    assert set(json.loads(page.data)) == set(Page("").as_values())


def test_the_page_of_a_search_has_all_of_it(files: dict[str, Path]) -> None:
    data, found = data_of(files["report"]), findings()
    assert dict(data["facts"])["device"].endswith(WEIRD)
    titles = [view["title"] for view in data["timelines"]]
    assert titles == ["sequential, predicted", "sequential, measured", "auto, predicted"]
    step = found.predicted["auto"]
    view = data["timelines"][-1]
    assert len(view["bars"]) == len(step.intervals) and view["end"] == step.seconds
    shown = {
        (view["lanes"][b[0]], view["strands"][b[1]], view["names"][b[2]], b[3], b[4], b[5])
        for b in view["bars"]
    }
    assert shown == {
        (str(i.lane), str(i.strand), i.operator, i.layer, i.micro_batch, round(i.start, 12))
        for i in step.intervals
    }
    start, stop = view["window"]
    assert 0 < start < stop < view["end"]
    plans = list(found.plans.plans.values())
    assert [len(plan["rows"]) for plan in data["plans"]] == [len(plan.rows) for plan in plans]
    first = [row for row in data["plans"][0]["rows"] if len(row) == 4]
    assert [row[2] for row in first] == [issue.operator for issue in plans[0].issues]
    assert "forward" in data["plans"][0]["title"]
    candidates, memory = data["groups"]
    ranked = [row[0] for row in candidates["tables"][0]["rows"]]
    assert sorted(ranked) == sorted(found.predicted)
    assert ranked[candidates["tables"][0]["best"]] == found.winner == "auto"
    (bars,) = candidates["bars"]
    by_name = {row["name"]: row for row in bars["rows"]}
    for outcome in found.outcomes:
        assert sum(by_name[outcome.name]["parts"]) == pytest.approx(outcome.predicted)
        assert by_name[outcome.name]["mark"] == outcome.measured
    (slots,) = memory["bars"]
    assert [row["parts"] for row in slots["rows"]] == [
        [step.peak_bytes] for step in found.predicted.values()
    ]
    overlap = data["overlap"]
    assert all(len(row) == len(overlap["columns"]) for row in overlap["shares"])
    shares = [share for row in overlap["shares"] for share in row if share is not None]
    assert shares and all(0 <= share <= 1 for share in shares)
    assert str(found.solution.main) in data["conclusions"]


def test_what_to_change_names_the_lane_that_is_exposed(files: dict[str, Path]) -> None:
    found = findings()
    (outcome,) = (o for o in found.outcomes if o.name == "auto")
    share = outcome.exposed[Lane.TP] / outcome.predicted
    said = [text for text in data_of(files["report"])["changes"] if text.startswith("tp: ")]
    assert len(said) == (share > 0.02)
    assert all(f"({share:.1%}) are exposed" in text for text in said)
    text = "\n".join(data_of(files["prediction"])["changes"])
    assert "Stages have nothing to do in 15.0% of the step: have more micro-batches" in text
    assert "tp: 50.00 ms of the step (5.0%) are exposed" in text and "1.05× as fast" in text
    assert "30% of the operators' time is not measured but derived" in text
    assert "The step needs" not in text
    tight = prediction_page(replace(prediction(), memory_limit=60 << 30)).changes
    assert tight[0].startswith("The step needs 70.0 GiB of 60.0 GiB: let backward make more again")


def test_the_page_of_an_advice_says_why_others_lost(files: dict[str, Path]) -> None:
    data = data_of(files["advice"])
    assert data["title"] == "llama-3.1-70b on h100-64: the best of 384 choices"
    table = data["groups"][0]["tables"][0]
    assert [row[-1] for row in table["rows"]] == ["the best", *["its bubble is larger"] * 2]
    assert data["groups"][1]["tables"][0]["rows"][0] == [
        "needs more memory than a device has",
        "200",
    ]
    stages = data["timelines"][1]
    assert stages["lanes"] == ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert set(stages["strands"]) == {"forward", "backward", "both"}
    memory = data["groups"][-1]["bars"][0]
    assert memory["limit"] == 80 << 30 and memory["parts"] == ["weights", "optimizer", "slots"]


def test_a_step_of_too_many_operators_is_shown_around_its_excerpt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(values, "_MOST", 100)
    view = view_of("long", many(300), (148.0, 152.0))
    assert len(view.bars) == 100 and view.note.startswith("100 of 300 bars are here")
    assert view.bars[0][5] <= 101 and view.bars[-1][5] >= 198 and view.window == (148.0, 152.0)
    assert not view_of("short", many(100)).note


CHECK = """
<script>
const missed = [];
window.addEventListener("error", (event) => missed.push(event.message));
console.error = (...words) => missed.push(words.join(" "));
window.addEventListener("load", () => {
  const all = (where) => [...document.querySelectorAll(where)];
  const seen = { headings: all("h2").map((node) => node.textContent) };
  seen.timelines = all("svg.lanes").length;
  seen.bars = all("svg.lanes rect[data-bar]").length;
  seen.rows = all(".plan tr[data-name]").length;
  seen.heat = all(".heat tbody td").length;
  seen.bold = all("main h1 b, .facts b b").length;
  seen.facts = all(".facts").map((node) => node.textContent).join("");
  seen.wide = document.documentElement.scrollWidth - window.innerWidth;
  const click = (text) => all("button").find((node) => node.textContent === text).click();
  if (seen.timelines) {
    click("whole");
    seen.whole = all("svg.lanes rect[data-bar]").length;
    click("excerpt");
    seen.excerpt = all("svg.lanes rect[data-bar]").length;
    all(".plan tr[data-name]")[0].click();
    seen.picked = all("rect.picked").length;
    const name = all(".plan tr.picked")[0].dataset.name;
    const bar = all("rect.picked")[0];
    const place = { bubbles: true, clientX: 300, clientY: 300 };
    if (bar) bar.dispatchEvent(new PointerEvent("pointermove", place));
    seen.tip = document.getElementById("tip").textContent.includes(name);
    if (bar) bar.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    seen.left = all("rect.picked").length;
    all("svg.lanes")[0].dispatchEvent(new KeyboardEvent("keydown", { key: "-", bubbles: true }));
    seen.further = all("svg.lanes rect[data-bar]").length;
  }
  seen.errors = all(".track s").length;
  seen.missed = missed;
  const said = document.createElement("pre");
  said.id = "seen";
  said.textContent = JSON.stringify(seen);
  document.body.append(said);
});
</script>
"""
"""Uses a page as a reader does, and says what it saw."""


@pytest.fixture(scope="module")
def seen(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By page, what a browser without a network made of it."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("browser")
    found = {}
    for name, file in files.items():
        page = folder / file.name
        page.write_text(file.read_text().replace("<body>", f"<body>{CHECK}", 1))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"]
        options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000"]
        done = subprocess.run(
            [BROWSER, *options, "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=600,
        )
        said = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
        assert said, done.stderr[-2000:]
        found[name] = json.loads(html.unescape(said[1]))
    return found


@pytest.mark.parametrize("name", ["report", "prediction", "advice", "empty"])
def test_a_browser_shows_a_page_without_an_error(seen: dict[str, Any], name: str) -> None:
    assert seen[name]["missed"] == []
    assert seen[name]["wide"] <= 0, "wider than a laptop's screen"
    headings = {
        "report": ["Timeline", "Plan", "Candidates", "Memory", "What to change", "Overlap"],
        "prediction": ["Timeline", "Plan", "Lanes and stages", "Memory", "What to change"],
        "empty": [],
    }
    headings["advice"] = [*headings["prediction"][:2], "Candidates", "Left out"]
    headings["advice"] += headings["prediction"][2:]
    assert seen[name]["headings"] == headings[name]


def test_a_page_of_a_prediction_has_its_error_bars(
    files: dict[str, Path], seen: dict[str, Any]
) -> None:
    step, best = prediction(), advice()
    for name, found in {
        "prediction": [step],
        "advice": [*(one.prediction for one in best.candidates), best.best],
    }.items():
        rows = [
            row["error"]
            for group in data_of(files[name])["groups"]
            for bars in group["bars"]
            for row in bars["rows"]
            if row["error"]
        ]
        assert rows == [[one.low, one.high] for one in found]
        assert seen[name]["errors"] == len(rows), "each is drawn"


def test_a_browser_shows_names_as_text(seen: dict[str, Any]) -> None:
    assert WEIRD in seen["report"]["facts"] and seen["report"]["bold"] == 0


def test_timeline_and_plan_answer_to_a_reader(files: dict[str, Path], seen: dict[str, Any]) -> None:
    for name in ("report", "prediction"):
        page, data = seen[name], data_of(files[name])
        assert page["timelines"] == len(data["timelines"])
        assert page["rows"] == sum(len(row) == 4 for row in data["plans"][0]["rows"])
        assert page["picked"] > 0 and page["tip"] and page["left"] == 0
        assert page["excerpt"] == page["bars"] > 0
    report = seen["report"]
    assert report["whole"] > report["excerpt"] < report["further"]
    overlap = data_of(files["report"])["overlap"]
    assert report["heat"] == len(overlap["rows"]) * len(overlap["columns"])
