"""One engine in a process of its own: a JSON request on the command line, token ids as JSON on the last line.

Engines with more than one process, and the V2 model runner, need an environment that is set before anything starts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engines import PROMPTS, ask, make_llm, returned_logprobs
from vllm import SamplingParams


def main(request: dict[str, Any]) -> None:
    llm = make_llm(request["model"], request["esamp"], **request["options"])
    sampling = [SamplingParams(**given) for given in request["sampling"]]
    results = ask(llm, sampling, PROMPTS[: len(sampling)])
    result: dict[str, Any] = {
        "outputs": [[list(sample.token_ids) for sample in output.outputs] for output in results],
        "logprobs": [[returned_logprobs(sample).tolist() for sample in output.outputs] for output in results],
    }
    if request["distillers"]:
        result["distillers"] = llm.collective_rpc(_distillers)
    print(json.dumps(result), flush=True)


def _distillers(worker: Any) -> dict[str, Any]:
    """A rank's Distillers, bit for bit."""
    import hashlib

    from esamp_core.bindings import vllm_models

    mixer = vllm_models._latest
    assert mixer is not None and mixer.explorer is not None
    state = mixer.explorer.state_dict()
    digest = hashlib.sha256()
    for _, tensor in sorted(state["tensors"].items()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    updates = state["tensors"]["updates"].tolist()
    shard = worker.get_model().lm_head.shard_indices
    return {"bits": digest.hexdigest(), "updates": updates, "vocab_start": shard.org_vocab_start_index}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
