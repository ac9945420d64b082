"""The default learning rule learns, on real hidden states, and stays stable whatever the width."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from esamp_core import countdown
from esamp_core.decoder import Decoder
from esamp_core.distiller import DistillerBank
from esamp_core.explorer import Explorer
from esamp_core.sample import DistillerConfig, SamplingParams, distiller_forward, distiller_step_, group_rows


def test_error_falls_on_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 64 steps, by at least 30 % of what an untrained Distiller has on the very same states."""
    model, tokenizer = countdown.load()
    decoder = Decoder(model, tokenizer)
    errors: dict[bool, list[float]] = {True: [], False: []}

    def sampling(learns: bool) -> Callable[[Explorer, Tensor, object], None]:
        def learn(explorer: Explorer, deep: Tensor, rows: object) -> None:
            relative = (explorer._learner.prediction() - deep).square().sum(-1) / deep.square().sum(-1)
            errors[learns].append(float(relative[rows.active].mean()))  # type: ignore[attr-defined]
            original(explorer, deep, rows)  # type: ignore[arg-type]

        return learn

    original = Explorer.learn
    prompts = [p.prompt for p in countdown.held_out_problems("tune", 8, seed=1)]
    for learns, config in ((False, DistillerConfig(lr=1e-12)), (True, DistillerConfig())):
        monkeypatch.setattr(Explorer, "learn", sampling(learns))
        # With next to no beta both runs draw the same tokens, so the states are the same.
        decoder.config = DistillerConfig(lr=config.lr, deep_scale=decoder.parts.deep_scale)
        params = SamplingParams(min_p=0.05, beta=1e-9, seed=0)
        decoder.generate(prompts, n=16, params=params, max_new_tokens=64, stop_token_ids=())
    late = slice(48, 64)
    untrained, trained = (sum(errors[k][late]) / 16 for k in (False, True))
    assert trained < 0.7 * untrained, (trained, untrained)
    assert max(errors[True]) < 3.0


def random_model_states(hidden: int, layers: int, rows: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shallow and deep states of a random-weight Qwen3, position by position, without end."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, head_dim=128,
    )  # fmt: skip
    model = Qwen3Model(config).eval()
    with torch.no_grad():
        out = model(torch.randint(0, 256, (rows, length)), output_hidden_states=True)
    shallow, deep = out.hidden_states[1], out.last_hidden_state
    t = 0
    while True:
        yield shallow[:, t % length], deep[:, t % length]
        t += 1


@pytest.mark.parametrize(("hidden", "rows", "steps"), [(896, 4, 4096), (896, 1, 1024), (3584, 2, 4096)])
def test_stable_on_random_weight_models(hidden: int, rows: int, steps: int) -> None:
    states = random_model_states(hidden, 3, rows, 64)
    config = DistillerConfig(rank=64, deep_scale=1.0)
    bank = DistillerBank(hidden, config, 1, "error", torch.device("cpu"))
    bank.reset(0, 0)
    groups = group_rows(torch.zeros(rows, dtype=torch.int64), 1)
    losses = []
    for _ in range(steps):
        shallow, deep = next(states)
        activations = distiller_forward(shallow, groups, bank.state.weights, bank.scale)
        distiller_step_(bank.state, activations, deep, groups, bank.scale, config)
        losses.append(float(bank.state.loss[0]))
    assert int(bank.state.updates[0]) == steps and int(bank.state.nonfinite[0]) == 0
    assert max(losses) < 1.5 * losses[0]
    assert sum(losses[-64:]) < 0.9 * sum(losses[:64])
