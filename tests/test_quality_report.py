"""The report page: well-formed, self-contained, nothing unescaped, and every part of the run in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esamp_core.base.errors import ArgumentError
from esamp_core.cli.app import app
from esamp_core.report import Curve, PromptSamples, RunFile, SampleText, StepSeries
from esamp_core.report.html_page import page

VOID = {"meta", "line", "br"}


class Checker(HTMLParser):
    """Every tag that is opened is closed, in order; nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []
        self.numbers: list[float] = []
        self.points: list[tuple[float, float]] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self._look(attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self._look(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert name not in ("src", "href", "onclick", "onload"), name
            assert "http" not in (value or "") and "url(" not in (value or "")
            if name == "points":
                pairs = [p.split(",") for p in (value or "").split()]
                self.points += [(float(x), float(y)) for x, y in pairs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.seen and "link" not in checker.seen and "@import" not in html
    assert re.search(r"url\(|https?:", html) is None
    return checker


def whole_run() -> RunFile:
    nasty = '<b>&"quoted"</b>'
    samples = [
        SampleText("ESamp", ["a", nasty, "c"], [0.0, -1.5, 2.5], True),
        SampleText("vanilla", ["a"], [0.0], False),
        SampleText("vanilla", [], [], None),
    ]
    return RunFile(
        title="A run <of> many",
        about={"model": "m & n"},
        prompts=[PromptSamples(nasty, samples), PromptSamples("second", samples[:1])],
        curves=[Curve("ESamp", [1, 4, 32], [0.2, 0.5, 1.0], [0.1, 0.4, 0.9], [0.3, 0.6, 1.0])]
        + [Curve(f"other {i}", [1, 4], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3]) for i in range(12)],
        steps=[StepSeries("ESamp", [0.0, 0.01, -0.001], [1.2, 0.8, 0.5]), StepSeries("vanilla", [0.0], [])],
    )


def test_the_page_is_well_formed_self_contained_and_escaped() -> None:
    html = page(whole_run())
    checker = checked(html)
    assert "<b>" not in html  # what a model writes is text
    text = "".join(checker.text)
    for part in ("A run <of> many", "m & n", '<b>&"quoted"</b>', "Pass@k", "Distiller error per step", "KL per step"):
        assert part in text
    assert "✓ right" in text and "✗ wrong" in text
    assert all(0 <= x <= 420 and 0 <= y <= 260 for x, y in checker.points) and len(checker.points) >= 3 + 12 * 2 + 3 + 4
    # Readable on a phone: the page scales with the screen, wide tables scroll by themselves, long words break.
    assert 'name="viewport" content="width=device-width' in html
    assert "overflow-x:auto" in html and "overflow-wrap:anywhere" in html


def test_tokens_are_shaded_by_their_novelty() -> None:
    values = [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    sample = SampleText("s", [f"t{v:g}" for v in values], values)
    html = page(RunFile("r", prompts=[PromptSamples("p", [sample])]))
    shade = {token: int(n) for n, token in re.findall(r'class="n(\d)" title="novelty [^"]*">(t[^<]*)<', html)}
    assert shade["t0"] == 0  # not scored
    rising = [shade[f"t{v:g}"] for v in values if v]
    assert rising == sorted(rising) and rising[0] == 0 and rising[-1] == 4 and len(set(rising)) == 5


@pytest.mark.parametrize(
    "run",
    [
        RunFile("nothing"),
        RunFile("one k", curves=[Curve("s", [1], [0.0], [0.0], [0.0])]),
        RunFile("flat", steps=[StepSeries("s", [0.0, 0.0], [0.0])]),
        RunFile("empty prompt", prompts=[PromptSamples("p", [])]),
    ],
)
def test_missing_and_flat_parts_still_make_a_page(run: RunFile) -> None:
    html = page(run)
    checked(html)
    assert "nan" not in html.lower().replace("nano", "")


def test_run_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    whole_run().write(path)
    assert RunFile.read(path) == whole_run()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "schema 1"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1, "title": "t"}', "not a complete run file"),
        (
            '{"schema": 1, "title": "t", "about": [], "prompts": [], "curves": [], "steps": []}',
            "not a complete run file",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ArgumentError, match=message):
        RunFile.read(path)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ArgumentError, match="one number per token"):
        SampleText("s", ["a"], [])
    with pytest.raises(ArgumentError, match="equally long"):
        Curve("s", [1], [0.1], [], [0.2])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_on_a_phone_without_scrolling_sideways(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(page(whole_run()), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe id="f" src="page.html" style="width:390px;height:900px;border:0"></iframe><script>onload=()=>{'
        "const d=document.getElementById('f').contentDocument;"
        "const t=[...d.querySelectorAll('figure svg')].filter(s=>s.getBoundingClientRect().width>300).length;"
        "document.title=`width ${d.documentElement.scrollWidth} charts ${t} errors ${d.querySelector('parsererror')}`}"
        "</script>",
        encoding="utf-8",
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, frame.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>width (\d+) charts (\d+) errors null</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    assert int(title[1]) <= 390 and int(title[2]) == 3


def test_generate_writes_a_run_that_report_shows(tmp_path: Path) -> None:
    run, out = tmp_path / "run.json", tmp_path / "page.html"
    command = ["generate", "3 7 3 5 -> 41 :", "-n", "3", "--max-new-tokens", "6", "--seed", "1", "--no-gate"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "o.jsonl"), "--run-json", str(run)])
    assert result.exit_code == 0, result.output
    samples = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    written = RunFile.read(run)
    assert len(written.prompts[0].samples) == 3 and written.prompts[0].prompt == "3 7 3 5 -> 41 :"
    lengths = [len(s["kl"]) for s in samples]
    assert lengths == [len(s["token_ids"]) for s in samples] and len(written.steps[0].kl) == max(lengths)
    for t, kl in enumerate(written.steps[0].kl):
        exact = [s["kl"][t] for s in samples if len(s["kl"]) > t]
        # A KL is not negative; what is left is the rounding of two log-probabilities.
        assert kl == pytest.approx(sum(exact) / len(exact)) and kl > -1e-5
    assert max(written.steps[0].kl) > 0
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(out)]).exit_code == 0
    checked(out.read_text(encoding="utf-8"))
