"""One Explorer and several threads: at work one at a time, or refused at once.  And processes that fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from explorer_helpers import PARAMS, make, step
from torch import nn

from esamp_core import Decoder, Explorer, SamplingParams, countdown
from esamp_core.decoder.kv_cache import RowCache
from esamp_core.sample import DistillerConfig, Rows, StateError

PROMPTS = ["3 7 3 5 -> 41 :", "1 2 3 4 -> 10 :", "5 5 5 1 -> 20 :", "2 2 2 2 -> 8 :"]
SAMPLING = SamplingParams(seed=1, min_p=0.05, beta=0.5, distinct=False)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return countdown.load()


def in_thread(work: Callable[[], object]) -> BaseException | None:
    """Run it in another thread, to its end; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0] if raised else None


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def explorer_of(decoder: Decoder, **options: Any) -> Explorer:
    head = decoder.parts.head
    return Explorer(head, head.hidden_size, decoder.config, **({"max_groups": 8, "max_rows": 8} | options))


def numbers(generations: list[Any]) -> list[Any]:
    return [(g.prompt_index, g.sample_index, g.token_ids, g.logprobs) for g in generations]


def test_every_verb_is_refused_while_another_thread_is_in_a_loop() -> None:
    explorer = make()
    rows = explorer.open(["a"], PARAMS)
    saved = explorer.state_dict()
    shallow = torch.zeros(1, 16)
    verbs: list[Callable[[], object]] = [
        lambda: explorer.open(["b"]),
        lambda: explorer.close(rows),
        lambda: explorer.predict(shallow, rows),
        lambda: explorer.prediction(rows),
        lambda: explorer.distilled(rows),
        lambda: explorer.mix(shallow, rows),
        lambda: explorer.sample(torch.zeros(1, 50), rows),
        lambda: explorer.branch(torch.zeros(1, 50), rows),
        lambda: explorer.learn(shallow, rows),
        explorer.flush,
        explorer.stats,
        explorer.updates,
        explorer.state_dict,
        lambda: explorer.load_state_dict(saved),
        lambda: rows.keep([0]),
        lambda: rows + rows,
        lambda: rows.spread([0]),
        rows.end,
    ]
    before = explorer.ledger.books
    with explorer.alone():
        for verb in verbs:
            error = in_thread(verb)
            assert isinstance(error, StateError) and "another thread" in str(error)
        with explorer.alone():  # of the same thread, as often as it likes
            step(explorer, rows)
        assert isinstance(in_thread(explorer.flush), StateError)
    assert explorer.ledger.books is before and rows.current
    assert in_thread(lambda: step(explorer, rows, 1)) is None  # one after the other is fine
    explorer.close(rows)


def test_two_decoders_with_one_explorer(loaded: tuple[Any, Any]) -> None:
    """The second is refused at once, in the middle of the first, which does not notice; afterwards it works."""
    model, tokenizer = loaded
    first, second = Decoder(model, tokenizer), Decoder(*countdown.load())
    want = numbers(first.generate(PROMPTS, n=2, params=SAMPLING, max_new_tokens=12))
    explorer = explorer_of(first)
    one, two = Decoder(model, tokenizer, explorer=explorer), Decoder(second.model, tokenizer, explorer=explorer)
    refused: list[BaseException | None] = []

    def meanwhile(_: Any) -> None:
        if not refused:
            refused.append(in_thread(lambda: two.generate(PROMPTS, n=2, params=SAMPLING, max_new_tokens=12)))

    got = one.generate(PROMPTS, n=2, params=SAMPLING, max_new_tokens=12, max_batch_rows=8, on_token=meanwhile)
    assert isinstance(refused[0], StateError) and "another thread" in str(refused[0])
    assert numbers(got) == want and explorer.open_rows == 0
    assert in_thread(lambda: two.generate(PROMPTS, n=2, params=SAMPLING, max_new_tokens=4)) is None
    assert hooks(second.model) == 0 and explorer.open_rows == 0


def test_an_engine_beside_a_decoder(loaded: tuple[Any, Any]) -> None:
    """An engine's rows outlive a decoder's call; its verbs are refused meanwhile, and go on afterwards."""
    decoder = Decoder(*loaded)
    explorer = explorer_of(decoder)
    alone = explorer_of(decoder)
    decoder = Decoder(*loaded, explorer=explorer)

    def engine(ex: Explorer, rows: Rows, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        shallow, deep = torch.randn(2, len(rows), 128, generator=generator)
        ex.predict(shallow, rows)
        assert ex.head is not None
        draw = ex.sample(deep @ ex.head.weight.T, rows)
        ex.learn(deep, rows)
        return draw.token_ids.tolist()

    rows, other = explorer.open(["engine"] * 2, SAMPLING), alone.open(["engine"] * 2, SAMPLING)
    drawn, refused = [engine(explorer, rows, 0)], []
    decoder.generate(
        PROMPTS[:2], n=2, params=SAMPLING, max_new_tokens=3, max_batch_rows=4,
        on_token=lambda _: refused.append(in_thread(lambda: engine(explorer, rows, 1))),
    )  # fmt: skip
    assert refused and all(isinstance(error, StateError) for error in refused)
    drawn += [engine(explorer, rows, 1), engine(explorer, rows, 2)]
    assert drawn == [engine(alone, other, seed) for seed in range(3)]
    explorer.close(rows)


def test_one_model_in_two_threads(loaded: tuple[Any, Any]) -> None:
    """Their taps would see each other's forwards."""
    model, tokenizer = loaded
    refused: list[BaseException | None] = []
    before = hooks(model)

    def meanwhile(_: Any) -> None:
        refused.append(in_thread(lambda: Decoder(model, tokenizer).generate(PROMPTS[:1], params=SAMPLING)))

    got = Decoder(model, tokenizer).generate(PROMPTS, params=SAMPLING, max_new_tokens=4, on_token=meanwhile)
    assert refused and all(isinstance(error, StateError) and "another thread" in str(error) for error in refused)
    want = Decoder(model, tokenizer).generate(PROMPTS, params=SAMPLING, max_new_tokens=4)
    assert numbers(got) == numbers(want) and hooks(model) == before


@pytest.mark.parametrize("name", ["join", "reorder_cache", "resize"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_decoder_that_runs_out_of_memory(
    loaded: tuple[Any, Any], name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that is: a given Explorer has its rows and slots back, and the next call is that of a new one."""
    decoder = Decoder(*loaded)
    options: dict[str, Any] = dict(n=2, params=SAMPLING, max_new_tokens=78, max_batch_rows=4)
    want = numbers(decoder.generate(PROMPTS * 2, **options))
    explorer = explorer_of(decoder)
    given, original, before = Decoder(*loaded, explorer=explorer), getattr(RowCache, name), hooks(loaded[0])
    for fails_at in (1, 2, 3):
        calls = 0

        def fails(self: Any, *arguments: Any, at: int = fails_at) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error("simulated")
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(RowCache, name, fails)
            with pytest.raises(error):
                given.generate(PROMPTS * 2, **options)
        assert explorer.open_rows == 0 and not explorer.stats() and hooks(loaded[0]) == before
    assert numbers(given.generate(PROMPTS * 2, **options)) == want


FORK = """
import os, sys
import torch
import esamp_core, esamp_core.sample
from esamp_core import Decoder, SamplingParams, countdown
torch.set_num_threads(1)  # OpenMP's own threads do not outlive a fork
def draw():
    model, tokenizer = countdown.load()
    params = SamplingParams(seed=1, min_p=.05)
    found = Decoder(model, tokenizer).generate(["3 7 3 5 -> 41 :"], n=2, params=params, max_new_tokens=8)
    return [g.token_ids for g in found]
if sys.argv[1] == "used":
    before = draw()
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, repr(draw()).encode())
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert os.read(read, 10**6).decode() == repr(draw())
"""


@pytest.mark.parametrize("when", ["imported", "used"])
def test_a_fork(when: str) -> None:
    """A child that was forked after the import, or after a call, draws what its parent does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", FORK, when], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_thousand_steps_of_joins_and_leaves() -> None:
    """Memory stays flat, and a group that comes late has the ids and the draws of one that came first."""
    config = DistillerConfig(rank=1, deep_scale=1.0, gate=False)

    def make_one() -> Explorer:
        return make(config, max_groups=4, max_rows=6, on_full="evict")

    explorer = make_one()
    batch = explorer.open([])
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(0, 6, (20_000, 2), generator=generator).tolist()
    sizes: list[tuple[int, int]] = []
    with torch.no_grad():
        for number, (leaves, joins) in enumerate(choices):
            if leaves < len(batch):
                batch = batch.keep([i for i in range(len(batch)) if i != leaves])
            if joins < 3 and len(batch) < 3:
                try:
                    new = explorer.open([f"g{number % 7}", None][: 1 + joins % 2], PARAMS, retain=joins == 2)
                except Exception as error:
                    assert "no Distiller slot" in str(error)
                else:
                    batch = batch + new
            if number % 10 == 0:  # joins and leaves are what may leak; a step costs fifty of them
                step(explorer, batch, number % 5)
            if number in (4_000, 19_999):
                gc.collect()
                sizes.append((resident_bytes(), len(gc.get_objects())))
    (bytes_before, objects_before), (bytes_after, objects_after) = sizes
    assert bytes_after - bytes_before < 16_000_000  # a kilobyte a step
    assert objects_after - objects_before < 1_000
    explorer.close(batch)
    books = explorer.ledger.books
    assert explorer.open_rows == 0 and len(books.leases) <= 4 and not books.open and len(books.fresh) <= 4
    late, first = explorer, make_one()
    drawn = []
    for one in (late, first):
        with one.open(["new", "new"], PARAMS) as rows:
            assert rows.sample_index == [0, 1]
            drawn.append([step(one, rows, seed)[0].tolist() for seed in range(4)])
    assert drawn[0] == drawn[1]
