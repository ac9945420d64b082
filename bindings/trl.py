"""TRL's GRPOTrainer with this library's rollouts: a prompt's completions are siblings, and come with their policy.

``Rollout`` is a ``rollout_func``.  ``BehaviourGRPOTrainer`` is a GRPOTrainer that puts the returned log-probabilities
to use: its ratio is to the policy that sampled.  See docs/rl.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from esamp_core.base.config import Apply, DistillerConfig, SamplingParams, check_apply, check_options
from esamp_core.base.errors import ArgumentError, EsampError, UnsupportedModelError
from esamp_core.bindings.hf_generate import left_undone, requested_params
from esamp_core.decoder import Decoder, Generation
from esamp_core.decoder.loop import CacheKind
from esamp_core.decoder.prompts import eos_token_ids


class Rollout:
    """``GRPOTrainer(..., rollout_func=Rollout())``: completions by :class:`~esamp_core.decoder.Decoder`.

    Equal prompts that follow each other, as the trainer repeats them, are siblings: they share a prefill and a
    Distiller.  Temperature, top-p, top-k, min-p and length are the trainer's.  Messages go through its chat template.

    beta: strength of exploration.  Default 0: completions are the model's own, and the ratio is 1 before an update.
        Above 0 they come from another policy, so the trainer has to be a :class:`BehaviourGRPOTrainer`.
    stratified: siblings divide every distribution evenly among them; each keeps its own, so that expectations over
        single completions stay what they are.  Default True.
    config, max_candidates, shallow_layer, apply, neutral: of the Decoder, for beta above 0.
    cache, max_batch_rows: of ``Decoder.generate``.
    Raises ArgumentError.

    In evaluation nothing is explored: it is the model that is evaluated.  Every call draws fresh seeds from torch's
    generator, which the trainer seeds, for each process differently.  Dropout is off while completions are drawn, and
    every module's mode is afterwards what it was.
    """

    def __init__(
        self,
        *,
        beta: float = 0.0,
        stratified: bool = True,
        config: DistillerConfig | None = None,
        max_candidates: int = 256,
        shallow_layer: int = 0,
        apply: Apply = "candidates",
        neutral: bool = False,
        cache: CacheKind = "dynamic",
        max_batch_rows: int | None = None,
    ) -> None:
        self._params = SamplingParams(beta=beta, stratified=stratified, distinct=False)
        check_options("transformers", max_candidates)
        check_apply(apply, (config or DistillerConfig()).target, neutral)
        self._decoder_options: dict[str, Any] = {
            "config": config,
            "max_candidates": max_candidates,
            "shallow_layer": shallow_layer,
            "apply": apply,
            "neutral": neutral,
        }
        self._cache, self._max_batch_rows = cache, max_batch_rows

    def __call__(self, prompts: Sequence[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """One completion for each of P prompts, texts or lists of messages; see TRL's ``RolloutFunc``.

        Returns prompt_ids, completion_ids, logprobs: P lists each; the last are nats, of the distribution that the
        tokens were drawn from.  Raises ArgumentError for what the trainer asks of generate and is not done here,
        UnsupportedModelError.
        """
        if self._params.beta != 0 and not isinstance(trainer, BehaviourGRPOTrainer):
            raise ArgumentError(
                f"beta must be 0 with {type(trainer).__name__}, which would take explored completions for the model's "
                f"own (use BehaviourGRPOTrainer), got {self._params.beta}"
            )
        training = trainer.model.training
        params = self._requested(trainer)
        if not training:
            params = replace(params, beta=0.0)
        prompt_ids = _token_ids(prompts, trainer)
        completions: list[Generation] = []
        with _evaluating(trainer) as model:
            decoder = Decoder(model, **self._decoder_options)  # afresh: weights, adapters and the head may be others
            most = trainer.num_generations if training else trainer.num_generations_eval
            for alike, n in sibling_runs(prompt_ids, most):
                completions += decoder.generate(
                    alike,
                    n=n,
                    params=params,
                    max_new_tokens=trainer.generation_config.max_new_tokens,
                    stop_token_ids=eos_token_ids(trainer.generation_config),
                    cache=self._cache,
                    max_batch_rows=self._max_batch_rows,
                )
        if not all(completion.token_ids for completion in completions):
            raise EsampError("the model left no token that could be drawn: all logits of a prompt are -inf or NaN")
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(completion.token_ids) for completion in completions],
            "logprobs": [list(completion.logprobs) for completion in completions],
        }

    def _requested(self, trainer: GRPOTrainer) -> SamplingParams:
        """What the trainer was configured to sample with."""
        if trainer.use_vllm:
            raise ArgumentError("use_vllm must be False with this rollout; inside vLLM exploration is a plugin's")
        if trainer.tools:
            raise ArgumentError("tools must be left out with this rollout, which draws one turn")
        config = trainer.generation_config
        if undone := {name: value for name, (value, _) in left_undone(config).items()}:
            raise ArgumentError(f"the trainer must ask for filters, a length and stop tokens alone, got {undone}")
        params = requested_params(config, self._params)
        if params.temperature != trainer.temperature:
            raise ArgumentError(
                f"generation_kwargs must leave the temperature at {trainer.temperature}, at which the trainer scores "
                f"completions, got {params.temperature}"
            )
        return params


def sibling_runs(prompts: Sequence[list[int]], most: int) -> Iterator[tuple[list[list[int]], int]]:
    """Runs of equal prompts, as (prompts, how often each is repeated), at most so often; in order.

    Prompts that follow each other and are repeated equally often come together, to be drawn as one batch.
    """
    runs: list[tuple[list[int], int]] = []
    for prompt, equal in groupby(prompts):
        count = len(list(equal))
        runs += [(prompt, min(most, count - first)) for first in range(0, count, most)]
    for n, together in groupby(runs, key=lambda run: run[1]):
        yield [prompt for prompt, _ in together], n


def _token_ids(prompts: Sequence[Any], trainer: GRPOTrainer) -> list[list[int]]:
    """As the trainer itself would encode them."""
    tokenizer = trainer.processing_class
    if hasattr(tokenizer, "image_processor"):
        raise UnsupportedModelError(f"prompts must be of text, got a trainer with a {type(tokenizer).__name__}")
    if isinstance(prompts[0], str):
        return [list(ids) for ids in tokenizer(text=list(prompts))["input_ids"]]
    encoded = tokenizer.apply_chat_template(
        conversation=list(prompts),
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return [list(ids) for ids in encoded["input_ids"]]


@contextmanager
def _evaluating(trainer: GRPOTrainer) -> Iterator[nn.Module]:
    """The trainer's model, unwrapped and in eval mode."""
    if trainer.is_fsdp_enabled:
        raise UnsupportedModelError("models sharded by FSDP cannot be sampled from here: their weights are in pieces")
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield model
        finally:
            for module, mode in modes:
                module.training = mode


class BehaviourGRPOTrainer(GRPOTrainer):
    """A GRPOTrainer whose importance ratio is to the policy that drew the completions.

    TRL uses the log-probabilities that a rollout returns with vLLM alone; else it takes completions for the model's
    own.  Here they are the loss's old log-probabilities: ``ratio = exp(log p_model - log p_rollout)``, per token or
    sequence, clipped as ever.  With vLLM, which TRL corrects itself, nothing is changed.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        if not self.use_vllm:
            if "sampling_per_token_logps" not in inputs:
                raise ArgumentError("rollout_func must be given, and return the logprobs of completions, got none")
            inputs = {**inputs, "old_per_token_logps": inputs["sampling_per_token_logps"]}
        loss: Tensor = super().compute_loss(model, inputs, *args, **options)
        return loss
