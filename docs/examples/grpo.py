"""GRPO with this library's rollouts: ``pip install '.[rl-examples]'``, then ``python docs/examples/grpo.py``.

Without arguments the embedded model learns Countdown puzzles for a few steps on the CPU.  With ``--model`` any chat
model learns a task of reasoning-gym, whose own grader is the reward.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from esamp_core import countdown
from esamp_core.bindings.trl import BehaviourGRPOTrainer, Rollout

Rewards = Callable[..., list[float]]


def puzzles(count: int) -> tuple[Any, Any, Dataset, Rewards]:
    """The embedded model and its own task: model, tokenizer, prompts, reward."""
    model, tokenizer = countdown.load()
    problems = countdown.held_out_problems("tune", count)

    def solved(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        asked = map(countdown.Problem.parse, prompts)
        return [float(countdown.check(*pair).correct) for pair in zip(asked, completions, strict=True)]

    return model, tokenizer, Dataset.from_dict({"prompt": [p.prompt for p in problems]}), solved


def reasoning(name: str, task: str, count: int) -> tuple[Any, Any, Dataset, Rewards]:
    """A chat model and a task of reasoning-gym."""
    import reasoning_gym
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tasks = reasoning_gym.create_dataset(task, size=count, seed=0)
    rows = [{"prompt": [{"role": "user", "content": tasks[i]["question"]}], "index": i} for i in range(count)]

    def graded(completions: list[list[dict[str, str]]], index: list[int], **_: Any) -> list[float]:
        answers = [completion[0]["content"].strip() for completion in completions]
        return [tasks.score_answer(answer, tasks[i]) for answer, i in zip(answers, index, strict=True)]

    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    return model, AutoTokenizer.from_pretrained(name), Dataset.from_list(rows), graded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers model with a chat template; default: the embedded one")
    parser.add_argument("--task", default="gcd", help="of reasoning-gym, with --model (default: gcd)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4, help="groups in a step (default: 4)")
    parser.add_argument("--siblings", type=int, default=8, help="completions of a group (default: 8)")
    parser.add_argument("--tokens", type=int, default=countdown.MAX_NEW_TOKENS, help="most of a completion")
    parser.add_argument("--beta", type=float, default=0.0, help="strength of exploration (default: 0)")
    parser.add_argument("--independent", action="store_true", help="siblings that are not stratified")
    asked = parser.parse_args()

    count = asked.steps * asked.prompts
    model, tokenizer, data, reward = (
        puzzles(count) if asked.model is None else reasoning(asked.model, asked.task, count)
    )
    trainer = BehaviourGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=asked.prompts * asked.siblings,
            num_generations=asked.siblings,
            max_completion_length=asked.tokens,
            max_steps=asked.steps,
            learning_rate=1e-5,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,  # the rollout's forward and the loss's round alike
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        rollout_func=Rollout(beta=asked.beta, stratified=not asked.independent),
    )
    trainer.train()
    print("step  reward  informative groups  clipped tokens")
    for log in trainer.state.log_history:
        if "reward" in log:
            # A group whose rewards are all equal has no advantage, and teaches nothing.
            informative, clipped = 1 - log["frac_reward_zero_std"], log["clip_ratio/region_mean"]
            print(f"{log['step']:4}  {log['reward']:6.3f}  {informative:17.1%}  {clipped:14.1%}")


if __name__ == "__main__":
    main()
