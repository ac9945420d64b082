"""Texts as people have them: marks, line ends, other encodings, halves of characters; read, or refused in one line."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Esamp, command, is_one_line, refuse_to_load
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import results
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import decoded, is_utf8, lines_of, read_text, replaced, write_text
from esamp_core.base.schema import check_plain, read_json, to_json
from esamp_core.cli.inputs import Asked, read_prompts
from esamp_core.sample import Draw, Explorer, Rows

A, B = "3 7 3 5 -> 41 :", "1 2 3 4 -> 24 :"
SHORT = ("-n", "1", "--seed", "1", "--max-new-tokens", "2")
# What str.splitlines takes for an end: form feed, separators, next line, line and paragraph separator.
NO_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
Text = st.text(st.characters(codec="utf-8", exclude_characters="\n") | st.sampled_from(NO_ENDS), max_size=8)
Line = Text.filter(lambda line: not line.endswith("\r"))
Plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
Writer = Callable[[list[str]], bytes]


@st.composite
def written(draw: st.DrawFn, lines: list[str]) -> bytes:
    """A file of these lines, with or without a mark, of either line end, the last with or without one."""
    end, last, mark = draw(st.sampled_from(["\n", "\r\n"])), draw(st.booleans()), draw(st.booleans())
    mark |= bool(lines) and lines[0].startswith("\ufeff")  # or the text's own would be taken for one
    last |= bool(lines) and lines[-1] == ""  # or there would be no last line
    return ("\ufeff" * mark + end.join(lines) + (end if last and lines else "")).encode()


@pytest.fixture
def esamp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Esamp:
    return command(monkeypatch, capsys)


@given(data=st.data(), lines=st.lists(Line, max_size=5))
def test_lines_come_back_however_they_were_written(data: st.DataObject, lines: list[str]) -> None:
    assert lines_of(decoded(data.draw(written(lines)), "a file")) == lines


@given(data=st.data(), lines=st.lists(Line.filter(lambda line: "\0" not in line), min_size=1, max_size=5))
def test_prompts_come_back_however_they_were_written(
    data: st.DataObject, lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines.append(A)
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_bytes(data.draw(written(lines)))
    assert read_prompts([], path) == [Asked(line) for line in lines if line.strip()]


@given(
    data=st.data(),
    asked=st.lists(
        st.builds(
            Asked,
            st.text(max_size=8),
            st.none() | st.text(max_size=3) | st.integers(-(2**63), 2**63 - 1),
            st.dictionaries(st.text(max_size=3).filter(lambda key: key not in ("prompt", "id")), Plain, max_size=3),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda one: object() if one.id is None else one.id,
    ),
)
def test_json_lines_come_back_or_are_refused(
    data: st.DataObject, asked: list[Asked], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("prompts") / data.draw(st.sampled_from(["p.jsonl", "p.ndjson", "p.JSONL"]))
    escaped = data.draw(st.booleans())
    lines = []
    for one in asked:
        entry = {"prompt": one.prompt, **one.metadata} | ({} if one.id is None else {"id": one.id})
        lines.append(json.dumps(entry, ensure_ascii=escaped or not is_utf8(str(entry))))
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") if not escaped else "\n".join(lines).encode())
    try:
        for one in asked:
            check_plain(one.metadata, "metadata")
    except ArgumentError:
        with pytest.raises(ArgumentError):
            read_prompts([], path)
    else:
        assert read_prompts([], path) == asked


@given(raw=st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode("utf-16")))
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_any_bytes_are_prompts_or_refused_in_one_line(
    suffix: str, raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("prompts") / f"p{suffix}"
    path.write_bytes(raw)
    try:
        read = read_prompts([], path)
    except ArgumentError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(is_utf8(one.prompt) for one in read) and read


BROKEN = [
    (b"ok\n\xff", "must be UTF-8, got byte 0xff in line 2 (byte 1 of it)"),
    (b"\xef\xbb\xbfok\r\nab\xe9\n", "must be UTF-8, got byte 0xe9 in line 2 (byte 3 of it)"),
    (A.encode("utf-16"), "must be UTF-8, got byte 0xff in line 1 (byte 1 of it: UTF-16?)"),
    (A.encode("utf-16-le"), "must be text in UTF-8, got a byte 0x00 in line 1"),
    (b"ok\n\na\0b\n", "must be text in UTF-8, got a byte 0x00 in line 3"),
    (b"\n \r\n\xe2\x80\xa8\n", "prompts must not be empty"),
]


@pytest.mark.parametrize(("raw", "message"), BROKEN)
def test_other_bytes_are_refused_before_a_model_is_loaded(
    raw: bytes, message: str, tmp_path: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    path = tmp_path / "p.txt"
    path.write_bytes(raw)
    run = esamp("generate", "--prompts", str(path))
    is_one_line(run, message)
    assert str(path) in run.stderr
    is_one_line(esamp("calibrate", "--prompts", str(path), "--out", str(tmp_path / "o")), message)
    is_one_line(esamp("generate", stdin=raw), message)


BAD_LINES = [
    ('{"prompt": "a', "must be JSON"),
    ("x", "must be JSON: Expecting value (character 1)"),
    ("[1]", "must be an object, got [1]"),
    ("{}", "must have a prompt, got nothing"),
    ('{"text": "a"}', "must have a prompt, got 'text'"),
    ('{"prompt": 5}', "must be a text, got 5"),
    ('{"prompt": null}', "must be a text, got None"),
    ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
    ('{"prompt": "a", "id": null}', "must be a text or an integer, got None"),
    ('{"prompt": "a", "id": 1.0}', "must be a text or an integer, got 1.0"),
    ('{"prompt": "a", "id": true}', "must be a text or an integer, got True"),
    ('{"prompt": "a", "id": "first"}', "must be unique, got 'first' of line 1 again"),
    ('{"prompt": "a", "x": NaN}', "NaN is no number of JSON"),
    ('{"prompt": "a", "x": [-Infinity]}', "-Infinity is no number of JSON"),
    ('{"prompt": "a", "x": 1e999}', "must be of finite numbers and texts of UTF-8, got inf"),
    ('{"prompt": "\\ud800"}', "must be of finite numbers and texts of UTF-8"),
    ('{"prompt": "a", "\\udc00": 1}', "must be of finite numbers and texts of UTF-8"),
    (f'{{"prompt": "a", "x": {"[" * 64}{"]" * 64}}}', "must be at most 64 deep"),
    (f'{{"prompt": "a", "x": {"[" * 100000}', "must be JSON: maximum recursion depth exceeded"),
    (f'{{"prompt": "a", "x": {"1" * 5000}}}', "must be JSON: Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_json_lines_are_refused_before_a_model_is_loaded(
    line: str, message: str, tmp_path: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "{A}", "id": "first"}}\n\n{line}\n{{"prompt": "c"}}', encoding="utf-8")
    run = esamp("generate", "--prompts", str(path))
    is_one_line(run, message)
    assert "line 3 of " in run.stderr and str(path) in run.stderr


def test_names_and_metadata_go_through(tmp_path: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = json.loads("[" * 63 + "]" * 63)
    lines = [{"prompt": f"{A}\u2028", "id": 7, "level": 1, "deep": deep}, {"prompt": B, "answer": "\x85é", "tags": []}]
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines), encoding="utf-8-sig")
    run = esamp("generate", "--prompts", str(path), *SHORT, "--out", str(out))
    assert run.returncode == 0, run.stderr
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2  # lines for every reader
    assert esamp("generate", "--prompts", str(path), *SHORT).stdout == out.read_text(encoding="utf-8")
    first, second = sorted(map(json.loads, out.read_bytes().splitlines()), key=lambda entry: entry["prompt_index"])
    assert (
        first["id"] == 7 and first["metadata"] == {"level": 1, "deep": deep} and first["prompt"] == lines[0]["prompt"]
    )
    assert "id" not in second and second["metadata"] == {"answer": "\x85é", "tags": []}

    def calibrate(model: object, tokenizer: object, prompts: list[str], *_: object) -> None:
        raise ArgumentError(f"prompts: {prompts}")

    monkeypatch.setattr("esamp_core.cli.calibrate.calibrate", calibrate)
    run = esamp("calibrate", "--prompts", str(path), "--out", str(tmp_path / "start"))
    assert run.returncode == 2 and f"prompts: {[lines[0]['prompt'], B]}" in run.stderr


def test_bytes_of_the_command_line_that_are_no_text(tmp_path: Path) -> None:
    """On the real one, where they arrive as halves of characters."""
    command = [sys.executable, "-m", "esamp_core.cli", "generate", b"3 7 \xff 5 -> 41 :", "--out", tmp_path / "o"]
    run = subprocess.run(command, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
    assert run.returncode == 2 and run.stderr.count(b"\n") == 1, run.stderr
    assert run.stderr.startswith(b"esamp: error: prompts must be UTF-8, got '3 7 \\udcff 5 -> 41 :' as number 1")
    assert not (tmp_path / "o").exists()


def test_other_options_with_bytes_that_are_no_text(
    esamp: Esamp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse_to_load(monkeypatch)
    is_one_line(esamp("generate", A, "\udcff"), "as number 2")
    is_one_line(esamp("generate", A, "--stop", "a", "--stop", "\udcff"), "--stop must be UTF-8")
    is_one_line(esamp("generate", "--prompts", "\udcff"), "--prompts cannot be read")
    is_one_line(esamp("generate", A, "--start", "\udcff"), "start cannot be read")
    is_one_line(esamp("report", "\udcff"), "cannot be read")
    monkeypatch.undo()
    is_one_line(esamp("generate", A, "--model", f"{tmp_path}/\udcff"), "--model")


class Ascii(io.TextIOWrapper):
    """A terminal that has little."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")


def test_stdout_is_utf8_whatever_the_terminal_has(tmp_path: Path, esamp: Esamp) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stdout = Ascii()
        patch.setattr(sys, "stdout", stdout)
        assert esamp("generate", f"{A}\u2029\u00e9"[:-1], *SHORT).returncode == 0
        assert esamp("doctor").returncode == 0
        assert esamp("demo", "--problems", "1", "--samples", "2").returncode == 0
    text = stdout.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert json.loads(text.split("\n")[0])["prompt"] == f"{A}\u2029" and "│" in text


@pytest.mark.parametrize("options", [(), ("--out", "/dev/full")])
def test_a_full_disk_is_one_line(options: tuple[str, ...], esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        if not options:
            patch.setattr(sys, "stdout", full)
        run = esamp("generate", A, *SHORT, *options)
        is_one_line(run, "cannot be written: [Errno 28]")


def test_closed_streams_are_one_line(esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    is_one_line(esamp("generate", A, *SHORT), "stdout must be open")


def test_numbers_that_are_none_are_null(esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Explorer.sample

    def spoiled(self: Explorer, logits: Tensor, rows: Rows) -> Draw:
        logits[:, -1] = float("nan")
        draw = original(self, logits, rows)
        return draw._replace(novelty=draw.novelty.fill_(float("inf")))

    monkeypatch.setattr(Explorer, "sample", spoiled)
    run = esamp("generate", A, "--no-distinct", *SHORT)
    assert run.returncode == 0
    entry = read_json(run.stdout, "stdout", strict=True)  # neither NaN nor Infinity
    assert entry["novelty"] == [None] * 2


@given(value=Plain)
def test_json_is_one_line_for_every_reader(value: Any) -> None:
    def known(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: known(item) for key, item in x.items()}
        if isinstance(x, list):
            return [known(item) for item in x]
        return None if isinstance(x, float) and (x != x or abs(x) == float("inf")) else x

    text = to_json(value)
    assert len(text.splitlines()) == 1 and read_json(text.encode(), "it", strict=True) == known(value)


def test_files_that_would_be_lost_are_refused(tmp_path: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_load(monkeypatch)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}')
    (tmp_path / "link").symlink_to(path)
    is_one_line(esamp("generate", "--prompts", str(path), "--out", str(tmp_path / "link")), "must be different files")
    is_one_line(esamp("generate", A, "--out", str(path), "--run-json", str(path)), "must be different files")
    assert path.read_text() == '{"prompt": "a"}'


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    with pytest.raises(KeyboardInterrupt), replaced(link) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
    write_text(link, "new", "it")
    assert path.read_text() == "new" and link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600
    write_text(Path("/dev/stdout"), "", "it")  # no file, or one without a name
    with pytest.raises(ArgumentError, match="it cannot be written"):
        write_text(tmp_path / "no" / "folder", "new", "it")
    with pytest.raises(ArgumentError, match="it cannot be read"):
        read_text(tmp_path, "it")
    with pytest.raises(ArgumentError, match="it cannot be read"):
        read_text(Path("a\0b"), "it")


def test_a_record_of_tests_that_was_cut_counts_as_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tests.jsonl"
    monkeypatch.setenv("ESAMP_TEST_RECORD", str(path))
    lines = [{"test": "a\u2028", "outcome": "passed", "seconds": 1.5}, {"test": "b", "outcome": "failed"}, {"exit": 0}]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(whole, encoding="utf-8")
    assert results.recorded_tests() == {"passed": 1, "failed": ["b"], "finished": True}
    for broken in (whole + '{"test": "c', whole.encode()[:7], whole.replace('"a', "a"), whole + "[]\n"):
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        found = results.recorded_tests()
        assert found is not None and not found["finished"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100000])
def test_results_that_are_none_are_one_line(raw: bytes, tmp_path: Path) -> None:
    from bench.quality_table import load_results

    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(SystemExit, match=r"x\.json"):
        results.load(tmp_path / "x.json")
    with pytest.raises(ArgumentError, match=r"x\.json"):
        load_results(tmp_path)
