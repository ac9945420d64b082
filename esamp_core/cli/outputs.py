"""What ``esamp generate`` writes, a line of JSON for each sample, and what ``--resume`` reads of it again.

A line is a :class:`~esamp_core.decoder.Generation` with the name and the metadata of its prompt, and the settings that
it was drawn with.  docs/files.md says what each field is.
"""

from __future__ import annotations

import codecs
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

from torch import nn

from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import replaced
from esamp_core.base.schema import COUNT, Within, check_plain, parse, read_json, to_json
from esamp_core.cli.inputs import Asked
from esamp_core.decoder import Generation
from esamp_core.decoder.results import FinishReason

Count = Annotated[int, COUNT]
Number = Annotated[float, Within(nan=True)]  # null where it is not known
MOST_TOLD = 20  # differences that a message names
OF_A_MODEL = ("fingerprint", "dtype")  # settings that are known when the model is loaded


@dataclass(frozen=True)
class OutputLine:
    """One line, as it is read back: a Generation's fields, and three more."""

    prompt_index: Count
    sample_index: Count
    prompt: str
    prompt_token_ids: tuple[Count, ...]
    text: str | None
    token_ids: tuple[Count, ...]
    logprobs: tuple[Number, ...]
    base_logprobs: tuple[Number, ...]
    novelty: tuple[Number, ...]
    kl: tuple[Number, ...]
    count: tuple[Count, ...]
    status: tuple[Count, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    seed: Annotated[int, Within(0, 2**64 - 1)]
    params: dict[str, Any]
    settings: dict[str, Any]
    perturbed_logprob: Number | None = None
    copy_of: Count | None = None
    distilled: None = None
    id: str | int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("logprobs", "base_logprobs", "novelty", "kl", "count", "status"):
            if (got := len(getattr(self, name))) != len(self.token_ids):
                raise ArgumentError(f"{name} must be one per token ({len(self.token_ids)}), got {got}")


def settings_of(
    *,
    model_name: str,
    params: SamplingParams,
    config: DistillerConfig,
    neutral: bool,
    one_for_all: bool,
    n: int,
    max_new_tokens: int,
    stop: Sequence[str],
) -> dict[str, Any]:
    """Everything asked for that decides what is drawn.  Raises ArgumentError if the file of start weights is not there.

    How many rows run at once, the cache and the device are left out: they do not.
    """
    distiller = asdict(config)
    del distiller["patience"]  # when to warn
    distiller["weight_dtype"] = str(config.weight_dtype).removeprefix("torch.")
    if config.start is not None:
        distiller["start"] = _digest(config.start)
    return {
        "model": model_name,
        "n": n,
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
        "neutral": neutral,
        "one_for_all": one_for_all,
        "params": asdict(params),
        "distiller": distiller,
    }


def settings_of_model(model: nn.Module) -> dict[str, Any]:
    """What decides beside: the model itself, whatever its name, and the dtype that it was loaded in."""
    from esamp_core.models.fingerprint import model_fingerprint

    dtype = next(model.parameters()).dtype
    return {"fingerprint": model_fingerprint(model), "dtype": str(dtype).removeprefix("torch.")}


def _digest(path: str) -> str:
    """Of what a file holds: its name says nothing."""
    try:
        with open(path, "rb") as file:
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except (OSError, ValueError) as error:
        raise ArgumentError(f"start cannot be read from {path!r}: {error}") from None


def check_same(out: Path | None, old: Mapping[str, Any], new: Mapping[str, Any], but: Sequence[str] = ()) -> None:
    """Raises ArgumentError, which names all differences of settings.  but: names that are not looked at."""
    was, now = _flat(old), _flat(new)
    names = [
        name
        for name in dict.fromkeys((*now, *was))
        if name not in but and (name not in was or name not in now or was[name] != now[name])
    ]
    if names:
        more = f"; and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
        told = "; ".join(f"{_short(n)} {_said(was, n)}, now {_said(now, n)}" for n in names[:MOST_TOLD]) + more
        # A fingerprint is also of the dtype.
        another = "another model: " if "fingerprint" in names and "dtype" not in names else ""
        raise ArgumentError(f"--resume: {out} was written with {another}{told}")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that options have; those of the Distiller begin with its own."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else None
        prefix = "" if name == "params" else f"{name}."
        found |= {name: value} if inner is None else {f"{prefix}{key}": item for key, item in inner.items()}
    return found


def _said(settings: Mapping[str, Any], name: str) -> str:
    return _short(to_json(settings[name])) if name in settings else "unknown"


def _short(text: str) -> str:
    """What a file says, in a line of a message."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def line_of(generation: Generation, asked: Asked, settings: Mapping[str, Any]) -> str:
    """One line of JSON, without its end."""
    entry = asdict(generation)
    if asked.id is not None:
        entry["id"] = asked.id
    if asked.metadata:
        entry["metadata"] = asked.metadata
    return to_json(entry | {"settings": settings})


class Place(NamedTuple):
    """Where a line stands in a file, in bytes, without its end."""

    start: int
    length: int


class Finished(NamedTuple):
    """What an output file holds."""

    prompts: set[int]  # whose n samples are all there
    places: list[Place]  # of their lines
    models: list[dict[str, Any]]  # settings of the models that drew it, in OF_A_MODEL; different ones


def read_finished(
    out: Path, asked: Sequence[Asked], settings: dict[str, Any], seeds: Sequence[int | None] | None
) -> Finished:
    """Read what an earlier run wrote.  A last line that was cut is left out.

    seeds: request seeds of the prompts, if they are not fresh ones.
    Raises ArgumentError, in one line: other settings, another prompt list, or a line that is broken.
    """
    samples: dict[int, dict[int, Place]] = {}
    first: dict[tuple[int, int], int] = {}  # the number of a sample's line
    models: list[dict[str, Any]] = []
    for number, place, raw in _whole_lines(out):
        where = f"line {number} of {out}"
        entry = parse(dict, raw, where)
        if "settings" not in entry:
            raise ArgumentError(
                f"--resume: {where} has no settings, as files of an earlier version; name another --out"
            )
        for name in ("settings", "params", "metadata"):  # all others have a type
            check_plain(entry.get(name), f"{name} in {where}")
        check_same(out, parse(dict, entry["settings"], f"settings in {where}"), settings, OF_A_MODEL)
        line = parse(OutputLine, entry, where)
        _check_line(line, where, asked, settings["n"], seeds)
        key = (line.prompt_index, line.sample_index)
        if first.setdefault(key, number) != number:
            raise ArgumentError(f"--resume: {where} must be another sample, got that of line {first[key]} again")
        samples.setdefault(line.prompt_index, {})[line.sample_index] = place
        model = {name: line.settings.get(name) for name in OF_A_MODEL}
        if model not in models:
            models.append(model)
    done = {index for index, have in samples.items() if len(have) == settings["n"]}
    return Finished(done, [place for index in sorted(done) for _, place in sorted(samples[index].items())], models)


def check_models(out: Path | None, finished: Finished, settings: Mapping[str, Any]) -> None:
    """Raises ArgumentError if another model than the one that was loaded now wrote a line."""
    for old in finished.models:
        check_same(out, old, {name: settings[name] for name in OF_A_MODEL})


def _check_line(
    line: OutputLine, where: str, asked: Sequence[Asked], n: int, seeds: Sequence[int | None] | None
) -> None:
    index = line.prompt_index
    known = asked[index] if index < len(asked) else None
    if known is None or (line.prompt, line.id, line.metadata) != (known.prompt, known.id, known.metadata):
        got = _short(repr(line.prompt)) + ("" if line.id is None else f", id {_short(repr(line.id))}")
        raise ArgumentError(f"--resume: {where} is of another prompt list (prompt_index {index}: {got})")
    if not line.sample_index < n or not (line.copy_of or 0) < n:
        raise ArgumentError(f"--resume: sample_index and copy_of in {where} must be in 0..{n - 1}")
    if seeds is not None and line.seed != seeds[index]:
        raise ArgumentError(f"--resume: {where} was drawn with seed {line.seed}, now {seeds[index]}")


def _whole_lines(out: Path) -> Iterator[tuple[int, Place, Any]]:
    """Number, place and content of the lines that are not blank, but a last one that an interrupted run was writing."""
    if not out.exists():
        return
    if not out.is_file():
        raise ArgumentError(f"--resume needs --out to be a file, got {out}")
    try:
        with out.open("rb") as file:
            broken: ArgumentError | None = None
            start = 0
            for number, raw in enumerate(file, 1):
                mark = len(codecs.BOM_UTF8) if start == 0 and raw.startswith(codecs.BOM_UTF8) else 0
                place = Place(start + mark, len(raw.rstrip(b"\r\n")) - mark)
                start += len(raw)
                if not raw[mark:].strip():
                    continue
                if broken is not None:
                    raise broken
                try:
                    text = raw[mark:].decode()
                    yield number, place, read_json(text, f"--resume: line {number} of {out}", strict=True)
                except UnicodeDecodeError as error:
                    broken = ArgumentError(
                        f"--resume: line {number} of {out} must be UTF-8, got byte 0x{raw[mark + error.start]:02x}"
                    )
                except ArgumentError as error:
                    broken = error
    except OSError as error:
        raise ArgumentError(f"--resume cannot read {out}: {error}") from None


def keep_only(out: Path, places: Sequence[Place]) -> None:
    """Leave only these lines, in this order, in one move.  Raises ArgumentError."""
    try:
        with out.open("rb") as old, replaced(out) as partial, partial.open("wb") as new:
            for place in places:
                old.seek(place.start)
                new.write(old.read(place.length) + b"\n")
    except OSError as error:
        raise ArgumentError(f"--out cannot be written: {error}") from None


@contextmanager
def open_output(out: Path | None, append: bool) -> Iterator[Callable[[str], None]]:
    """What writes a line at once, in UTF-8 whatever the terminal has; to stdout without a file.

    Raises ArgumentError, and BrokenPipeError where nobody reads stdout any more.
    """
    if out is None:
        stream = getattr(sys.stdout, "buffer", None)
        if stream is None:
            raise ArgumentError("stdout must be open, or --out name a file")
        try:
            yield lambda line: _write(stream, line)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ArgumentError(f"stdout cannot be written: {error}") from None
        return
    try:
        with out.open("ab" if append else "wb") as file:
            yield lambda line: _write(file, line)
    except OSError as error:
        raise ArgumentError(f"--out cannot be written: {error}") from None


def _write(file: IO[bytes], line: str) -> None:
    file.write(line.encode() + b"\n")
    file.flush()
