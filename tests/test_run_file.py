"""run.json and its page, whatever a file or a model says: read or refused, shown or escaped."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import Esamp, command, is_one_line, mutated
from hypothesis import given
from hypothesis import strategies as st

from esamp_core.base.errors import ArgumentError
from esamp_core.base.schema import read_json
from esamp_core.report import Curve, PromptSamples, RunFile, SampleText, StepSeries, run_report
from esamp_core.report.html_page import page

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\u202e\u2066\x00\x1b\x7f\x9b\ud800"
CONTENT: dict[str, Any] = {
    "schema": 1,
    "title": NASTY,
    "about": {NASTY: NASTY},
    "prompts": [
        {
            "prompt": NASTY,
            "samples": [{"sampler": NASTY, "tokens": [NASTY, "a"], "novelty": [1.0, None], "correct": True}],
        }
    ],
    "curves": [{"sampler": NASTY, "k": [1, 2], "mean": [0.1, 0.2], "low": [0, 0.1], "high": [1, 0.3]}],
    "steps": [{"sampler": NASTY, "kl": [1.0, None, -2.0], "loss": [1.0]}],
    "kl_is": NASTY,
}
Name = st.text(max_size=6) | st.just(NASTY)
Known = st.floats(-1e300, 1e300) | st.just(math.nan)
Share = st.floats(0, 1)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    k = sorted(draw(st.sets(st.integers(1, 2**62), max_size=4)))
    return Curve(draw(Name), k, *([draw(Share) for _ in k] for _ in range(3)))


@st.composite
def samples(draw: st.DrawFn) -> SampleText:
    tokens = draw(st.lists(Name, max_size=4))
    return SampleText(draw(Name), tokens, [draw(Known) for _ in tokens], draw(st.none() | st.booleans()))


Runs = st.builds(
    RunFile,
    Name,
    st.dictionaries(Name, Name, max_size=2),
    st.lists(st.builds(PromptSamples, Name, st.lists(samples(), max_size=2)), max_size=2),
    st.lists(curves(), max_size=3),
    st.lists(st.builds(StepSeries, Name, st.lists(Known, max_size=5), st.lists(Known, max_size=5)), max_size=2),
    Name,
)


class Tags(HTMLParser):
    """Every tag and attribute that a reader of the page finds."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def is_safe(html: str) -> None:
    found = Tags(html)
    assert not found.tags & {"script", "img", "iframe", "object", "link", "a"}
    assert not any(name.startswith("on") or name in ("src", "href") for name in found.attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)


def run_of(content: str, folder: Path) -> Path:
    path = folder / "run.json"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.fixture
def esamp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Esamp:
    return command(monkeypatch, capsys)


@given(run=Runs)
def test_what_was_written_can_be_read_and_shown(run: RunFile, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "run.json"
    run.write(path)
    read_json(path.read_bytes(), "run.json", strict=True)  # NaN is null
    assert repr(RunFile.read(path)) == repr(run)  # NaN is not NaN
    html = run_report(path).read_text(encoding="utf-8")
    is_safe(html)


@given(content=mutated(CONTENT))
def test_any_change_of_a_file_is_shown_or_refused(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = run_of(json.dumps(content), tmp_path_factory.mktemp("run"))
    try:
        html = run_report(path).read_text(encoding="utf-8")
    except ArgumentError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
        assert sorted(p.name for p in path.parent.iterdir()) == ["run.json"]
    else:
        is_safe(html)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), True),
        (("schema",), 1.0),
        (("title",), None),
        (("about", "x"), 1),
        (("prompts",), "abc"),
        (("prompts", 0, "prompt"), 5),
        (("prompts", 0, "samples", 0, "correct"), "yes"),
        (("prompts", 0, "samples", 0, "tokens"), [1, 2]),
        (("prompts", 0, "samples", 0, "novelty"), [1.0]),
        (("prompts", 0, "samples", 0, "novelty", 0), math.inf),
        (("prompts", 0, "samples", 0, "more"), 1),
        (("curves", 0, "k"), ["1", "2"]),
        (("curves", 0, "k"), [2, 1]),
        (("curves", 0, "k"), [1, 1]),
        (("curves", 0, "k"), [0, 1]),
        (("curves", 0, "k"), [1, 2, 3]),
        (("curves", 0, "mean", 0), 1.5),
        (("curves", 0, "mean", 0), math.nan),
        (("curves", 0, "low", 0), -0.1),
        (("steps", 0, "kl", 0), -math.inf),
        (("steps", 0, "loss", 0), 1e301),
        (("steps", 0), {"sampler": "a", "kl": []}),
        (("more",), 1),
    ],
)
def test_fields_out_of_range_are_refused(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    content: Any = json.loads(json.dumps(CONTENT))
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(ArgumentError, match=r"run\.json") as told:
        RunFile.read(run_of(json.dumps(content), tmp_path))
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["title", "about", "prompts", "curves", "steps"])
def test_parts_that_are_missing_are_refused(name: str, tmp_path: Path) -> None:
    content = {key: value for key, value in CONTENT.items() if key != name}
    with pytest.raises(ArgumentError, match=f"not a complete run file: run must have {name}"):
        RunFile.read(run_of(json.dumps(content), tmp_path))


@pytest.mark.parametrize("raw", ["", "[" * 200_000, '{"schema": 1', "\ufeff[]", "1" * 5000])
def test_what_is_no_run_file_is_one_line(raw: str, tmp_path: Path, esamp: Esamp) -> None:
    is_one_line(esamp("report", str(run_of(raw, tmp_path))), "run.json")
    (tmp_path / "run.json").write_bytes(b"\xff\xfe[\0]\0")
    is_one_line(esamp("report", str(tmp_path / "run.json")), "must be UTF-8, got byte 0xff")
    is_one_line(esamp("report", str(tmp_path)), "cannot be read")
    is_one_line(esamp("report", "."), "cannot be read")


def test_what_cannot_be_read_is_not_made(tmp_path: Path) -> None:
    for wrong in (
        lambda: SampleText("s", ["a"], [math.inf]),
        lambda: SampleText("s", [1], [0.0]),  # type: ignore[list-item]
        lambda: SampleText("s", ("a",), (0.0,)),  # type: ignore[arg-type]
        lambda: Curve("s", [1], [1.5], [0.0], [1.0]),
        lambda: Curve("s", [2, 1], [0.5] * 2, [0.0] * 2, [1.0] * 2),
        lambda: StepSeries("s", [], [-math.inf]),
        lambda: RunFile("t", about={1: "x"}),  # type: ignore[dict-item]
        lambda: RunFile("t", prompts=["x"]),  # type: ignore[list-item]
    ):
        with pytest.raises(ArgumentError):
            wrong()
    run = RunFile("t", curves=[Curve("s", [1], [0.5], [0.0], [1.0])])
    run.write(tmp_path / "run.json")
    run.curves[0].mean[0] = 7.0  # after it was checked
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ArgumentError, match="mean"):
        run.write(tmp_path / "run.json")
    assert (tmp_path / "run.json").read_bytes() == before


def test_hostile_text_is_shown_as_it_is() -> None:
    sample = SampleText(NASTY, [NASTY, "y" * 200_000, "\u05d0\u202e\n\t"], [1.0, math.nan, 2.0], True)
    html = page(RunFile(NASTY, {NASTY: NASTY}, [PromptSamples(NASTY, [sample])], kl_is=NASTY))
    is_safe(html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&gt;&lt;img src=x onerror=alert(2)&gt;&amp;" in html
    assert r"\u202e\u2066\u0000\u001b\u007f\u009b\ud800" in html and "\u05d0\\u202e\n\t" in html
    assert "y" * 1000 + "... (200000 characters)" in html and len(html) < 20_000
    assert 'title="novelty unknown"' in html


@pytest.mark.parametrize(
    "run",
    [
        RunFile("", {}, [], [], [], ""),
        RunFile("r", prompts=[PromptSamples("", []), PromptSamples("", [SampleText("", [], [])])]),
        RunFile("r", curves=[Curve("a", [], [], [], [])]),
        RunFile("r", curves=[Curve("a", [], [], [], []), Curve("b", [2**62], [1.0], [0.0], [1.0])]),
        RunFile("r", steps=[StepSeries("a", [math.nan] * 3, [math.nan]), StepSeries("b", [], [])]),
        RunFile("r", steps=[StepSeries("a", [1e300, -1e300, math.nan], [-1.0, -2.0]), StepSeries("b", [-5e-324], [])]),
    ],
)
def test_empty_and_unknown_parts_make_a_page(run: RunFile) -> None:
    html = page(run)
    is_safe(html)
    assert not re.search(r"\b(nan|inf)\b", html)
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', html))):
        assert 0 <= float(x) <= 420 and 0 <= float(y) <= 260


def test_gaps_are_left_out_of_a_line() -> None:
    html = page(RunFile("r", steps=[StepSeries("a", [1.0, math.nan, 2.0], [])]))
    (points,) = re.findall(r'points="([^"]*)"', html)
    assert len(points.split()) == 2 and "<th>3</th>" in html and "<th>2</th>" not in html


def test_a_page_never_takes_its_runs_place(tmp_path: Path, esamp: Esamp) -> None:
    path = tmp_path / "run.html"
    RunFile("t").write(path)
    before = path.read_bytes()
    is_one_line(esamp("report", str(path)), "--out must be another file than the run")
    is_one_line(esamp("report", str(path), "--out", str(tmp_path / "no" / "x")), "--out cannot be written")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.html"]
