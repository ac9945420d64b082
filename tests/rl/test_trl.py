"""GRPO with this library's rollouts: TRL's own trainer, its own loss, on the CPU."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from esamp_core.bindings.trl import BehaviourGRPOTrainer, Rollout, sibling_runs
from esamp_core.decoder import Decoder
from esamp_core.sample import ArgumentError, DistillerConfig, SamplingParams, UnsupportedModelError

SIBLINGS = 4
# A forward of a padded batch without a cache rounds otherwise than a decode step.
ROUNDING = 1e-4
UNGATED = DistillerConfig(gate=False, lr=0.5)
MESSAGES = [[{"role": "user", "content": text}] for text in ("say ab", "spell cat", "1+1", "x")]


def vowels(completions: list[Any], **_: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(letter in "aeiou" for letter in text)) for text in texts]


class Watched(BehaviourGRPOTrainer):
    """Keeps the importance ratio of every token in every loss, as TRL's own forward gives it."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        vars(self).setdefault("ratios", []).append((self.state.global_step, model.training, self.ratio(model, inputs)))
        return super().compute_loss(model, inputs, *args, **options)

    def ratio(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
        return (logps - inputs["sampling_per_token_logps"])[inputs["completion_mask"].bool()].exp()


def trainer(
    folder: Path,
    rollout: Rollout,
    kind: type[GRPOTrainer] = Watched,
    model: Any = None,
    prompts: list[Any] = MESSAGES,
    peft_config: Any = None,
    **config: Any,
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 * SIBLINGS,
        "per_device_eval_batch_size": 2 * SIBLINGS,
        "num_generations": SIBLINGS,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    return kind(
        model=tiny_model() if model is None else model,
        reward_funcs=vowels,
        args=GRPOConfig(**settings | config),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
        peft_config=peft_config,
    )


def first_ratios(run: Any) -> Tensor:
    return torch.cat([ratio for step, _, ratio in run.ratios if step == 0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("stratified", [False, True])
def test_two_steps_with_ratio_1_before_the_first_update(tmp_path: Path, temperature: float, stratified: bool) -> None:
    # Two losses a step, so that the second step's are of completions drawn before the first update.
    run = trainer(
        tmp_path, Rollout(stratified=stratified), temperature=temperature, num_iterations=2, steps_per_generation=1
    )
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    run.train()
    assert run.state.global_step == 2
    ratios = first_ratios(run)
    assert len(ratios) > 2 * SIBLINGS and (ratios - 1).abs().max() < ROUNDING
    later = torch.cat([ratio for step, _, ratio in run.ratios if step == 1])
    assert (later - 1).abs().max() > 100 * ROUNDING  # the weights have moved, the completions not
    assert any((weight != before[name]).any() for name, weight in run.model.named_parameters())
    logged = [log for log in run.state.log_history if "frac_reward_zero_std" in log]
    assert len(logged) == 1 and all(0 <= log["frac_reward_zero_std"] <= 1 for log in logged)


def test_new_completions_come_from_the_weights_of_now(tmp_path: Path) -> None:
    """One rollout object for all steps: each is on policy when it is first learned from."""
    run = trainer(tmp_path, Rollout(), max_steps=3)
    run.train()
    assert [step for step, _, _ in run.ratios] == [0, 1, 2]
    assert all((ratio - 1).abs().max() < ROUNDING for _, _, ratio in run.ratios)


@pytest.mark.parametrize("apply", ["candidates", "latent"])
def test_exploration_is_told_to_the_loss(tmp_path: Path, apply: Any) -> None:
    """The ratio is not 1, and of all tokens that could have been drawn its mean is: sum of p_rollout * ratio = 1."""
    run = trainer(tmp_path, Rollout(beta=0.5, config=UNGATED, apply=apply), max_completion_length=40)
    run.train()
    ratios = first_ratios(run)
    assert (ratios - 1).abs().max() > 0.05
    spread = float(ratios.std()) / math.sqrt(len(ratios))
    assert abs(float(ratios.mean()) - 1) < 5 * spread  # one outcome, fixed by the seed; 5 sigma of a mean of hundreds
    plain = torch.cat([r for s, _, r in run.ratios])
    assert torch.isfinite(plain).all()


def test_the_loss_uses_the_ratio(tmp_path: Path) -> None:
    """TRL's token loss of one batch, from its own parts: -min(ratio A, clip(ratio) A) over the completions."""
    run = trainer(tmp_path, Rollout(beta=0.5, config=UNGATED), max_steps=1, loss_type="bnpo", max_completion_length=30)
    kept: list[tuple[dict[str, Any], float]] = []
    loss_of = run.compute_loss

    def keep(model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        loss = loss_of(model, inputs, *args, **options)
        kept.append((inputs, float(loss.detach())))
        return loss

    run.compute_loss = keep
    run.train()
    (inputs, loss), mask = kept[0], kept[0][0]["completion_mask"]
    ratio = torch.ones(mask.shape)
    ratio[mask.bool()] = run.ratios[0][2]
    advantage = inputs["advantages"][:, None]
    token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    want = float((token * mask).sum() / mask.sum())
    on_policy = float((-advantage * mask).sum() / mask.sum())
    assert abs(loss - want) < 1e-4 and abs(loss - on_policy) > 1e-3


def test_evaluation_does_not_explore(tmp_path: Path) -> None:
    run = trainer(tmp_path, Rollout(beta=0.5, config=UNGATED), num_generations_eval=2)
    run.evaluate()
    assert run.ratios and not any(training for _, training, _ in run.ratios)
    assert all((ratio - 1).abs().max() < ROUNDING for _, _, ratio in run.ratios)


def test_modes_of_modules_come_back_and_dropout_is_off(tmp_path: Path) -> None:
    model = tiny_model(attention_dropout=0.5)
    run = trainer(tmp_path, Rollout(), model=model)
    run.model.train()
    run.model.model.layers[0].eval()
    modes = [module.training for module in run.model.modules()]
    seen: list[bool] = []
    handle = run.model.model.layers[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    out = run.rollout_func(MESSAGES[:1] * SIBLINGS, run)
    handle.remove()
    assert [module.training for module in run.model.modules()] == modes and seen and not any(seen)
    assert len(out["completion_ids"]) == SIBLINGS


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_adapters(tmp_path: Path, beta: float) -> None:
    """LoRA in training: drawn with the adapter of now."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path, Rollout(beta=beta, config=UNGATED), peft_config=lora, learning_rate=0.5, max_steps=3)
    run.train()
    last = run.ratios[-1][2]
    assert "lora" in " ".join(name for name, p in run.model.named_parameters() if p.requires_grad)
    assert (last - 1).abs().max() < ROUNDING if beta == 0 else (last - 1).abs().max() > 0.01


def test_adapter_on_the_head() -> None:
    """Candidates are scored by the head's own rows, so they refuse one that an adapter changes; a kept Decoder too."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")).eval()
    prompts, options = [[3, 9, 14, 4]], {"n": 3, "max_new_tokens": 12, "stop_token_ids": ()}
    params = SamplingParams(beta=0.5, distinct=False, seed=0)
    candidates, latent = (Decoder(model, config=UNGATED, apply=apply) for apply in ("candidates", "latent"))
    candidates.generate(prompts, params=params, **options)  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    for decoder in (candidates, Decoder(model, config=UNGATED)):
        with pytest.raises(UnsupportedModelError, match="the output head as read"):
            decoder.generate(prompts, params=params, **options)
    for decoder, beta in ((candidates, 0.0), (latent, 0.5)):
        asked = replace(params, beta=beta)
        for sample in decoder.generate(prompts, params=asked, return_distilled=True, **options):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompts[0], *sample.token_ids]])).logits[0, 3:-1]
            want = torch.tensor(sample.logprobs)
            torch.testing.assert_close(decoder.replay(sample, logits), want, atol=2 * ROUNDING, rtol=0)


def test_prompts_are_encoded_as_trl_encodes_them(tmp_path: Path) -> None:
    run = trainer(tmp_path, Rollout())
    for prompts in (MESSAGES, ["say ab", "x"]):
        want = run._tokenize_prompts(prompts)[0]
        assert run.rollout_func(prompts, run)["prompt_ids"] == want


def test_repeated_prompts_are_siblings(tmp_path: Path) -> None:
    """Stratified: of 8 completions of a prompt, floor(8 p) or ceil(8 p) begin with a token of probability p."""
    run = trainer(tmp_path, Rollout(), num_generations=8, per_device_train_batch_size=16, temperature=0.8)
    run.model.train()
    out = run.rollout_func([m for m in MESSAGES[:2] for _ in range(8)], run)
    for first in (0, 8):
        (prompt,) = {tuple(ids) for ids in out["prompt_ids"][first : first + 8]}
        with torch.no_grad():
            logits = run.model(torch.tensor([prompt])).logits[0, -1].double()
        p = (logits / 0.8).softmax(-1)
        counts = Counter(ids[0] for ids in out["completion_ids"][first : first + 8])
        assert all(abs(counts[token] - 8 * p[token]) < 1 for token in range(len(p)))
        for i in range(first, first + 8):
            assert abs(out["logprobs"][i][0] - float(p[out["completion_ids"][i][0]].log())) < ROUNDING
    again = run.rollout_func([m for m in MESSAGES[:2] for _ in range(8)], run)
    assert again["completion_ids"] != out["completion_ids"]


def test_completions_end_as_trl_wants_them(tmp_path: Path) -> None:
    run = trainer(tmp_path, Rollout(), max_completion_length=60)
    ends = [ids[-1] for ids in run.rollout_func([m for m in MESSAGES for _ in range(8)], run)["completion_ids"]]
    assert any(end == 1 for end in ends)
    lengths = [len(ids) for ids in run.rollout_func(MESSAGES * 8, run)["completion_ids"]]
    assert max(lengths) <= 60 and min(lengths) >= 1
    # What generation_kwargs say in their place holds.
    run = trainer(tmp_path, Rollout(), generation_kwargs={"max_new_tokens": 5, "eos_token_id": 20})
    found = run.rollout_func(MESSAGES * 8, run)["completion_ids"]
    assert max(map(len, found)) == 5 and any(ids[-1] == 20 and len(ids) < 5 for ids in found)
    assert any(1 in ids[:-1] for ids in found)


def test_sibling_runs() -> None:
    a, b, c = [1], [2, 3], [4]
    assert list(sibling_runs([a, a, b, b, c], 2)) == [([a, b], 2), ([c], 1)]
    assert list(sibling_runs([a] * 5, 2)) == [([a, a], 2), ([a], 1)]
    assert list(sibling_runs([a, b, a], 4)) == [([a, b, a], 1)]
    runs = list(sibling_runs([b] * 3 + [a] * 4, 8))
    assert runs == [([b], 3), ([a], 4)] and list(sibling_runs([], 8)) == []


def test_filters_of_the_trainer_are_obeyed(tmp_path: Path) -> None:
    run = trainer(tmp_path, Rollout(), top_k=1)
    out = run.rollout_func(MESSAGES[:1] * SIBLINGS, run)
    assert len({tuple(ids) for ids in out["completion_ids"]}) == 1  # top-k 1 is greedy
    assert all(abs(x) < 1e-6 for logprobs in out["logprobs"] for x in logprobs)


def test_refused(tmp_path: Path) -> None:
    for wrong in ({"beta": float("nan")}, {"stratified": 1}, {"max_candidates": 0}, {"apply": "logits"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            Rollout(**wrong)
    explores = Rollout(beta=0.1)
    run = trainer(tmp_path, explores, kind=GRPOTrainer)
    with pytest.raises(ArgumentError, match=r"beta must be 0 with GRPOTrainer.*BehaviourGRPOTrainer"):
        run.train()
    for asked in ({"repetition_penalty": 1.2}, {"generation_kwargs": {"no_repeat_ngram_size": 2}}):
        with pytest.raises(ArgumentError, match=r"alone, got \{'(repetition_penalty': 1.2|no_repeat_ngram_size': 2)\}"):
            trainer(tmp_path, Rollout(), **asked).train()
    with pytest.raises(ArgumentError, match=r"temperature at 1\.0"):
        trainer(tmp_path, Rollout(), generation_kwargs={"temperature": 0.5}).train()
    with pytest.raises(ArgumentError, match="rollout_func must be given"):
        trainer(tmp_path, None, kind=BehaviourGRPOTrainer).train()  # type: ignore[arg-type]
    run = trainer(tmp_path, Rollout())
    for name in ("tools", "use_vllm"):
        setattr(run, name, [vowels])
        with pytest.raises(ArgumentError, match=f"{name} must be"):
            run.rollout_func(MESSAGES[:1], run)
        setattr(run, name, [])
    run.is_fsdp_enabled = True
    with pytest.raises(UnsupportedModelError, match="FSDP"):
        run.rollout_func(MESSAGES[:1], run)


def test_plain_grpo_trainer_takes_unexplored_rollouts(tmp_path: Path) -> None:
    run = trainer(tmp_path, Rollout(), kind=GRPOTrainer, max_steps=1)
    run.train()
    assert run.state.global_step == 1
