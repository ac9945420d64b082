"""One engine in a process of its own: a JSON request on the command line, token ids as JSON on the last line.

Engines with more than one process, and the V2 model runner, need an environment that is set before anything starts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engines import PROMPTS, generate, make_llm
from vllm import SamplingParams


def main(request: dict[str, Any]) -> None:
    llm = make_llm(request["model"], request["esamp"], **request["options"])
    sampling = [SamplingParams(**given) for given in request["sampling"]]
    result: dict[str, Any] = {"outputs": generate(llm, sampling, PROMPTS[: len(sampling)])}
    if request["distillers"]:
        result["distillers"] = llm.collective_rpc(_distillers)
    print(json.dumps(result), flush=True)


def _distillers(worker: Any) -> dict[str, Any]:
    """A rank's Distillers, bit for bit."""
    import hashlib

    from esamp_core.bindings import vllm_models

    tap = vllm_models._latest
    assert tap is not None and tap.explorer is not None
    state = tap.explorer.state_dict()
    digest = hashlib.sha256()
    for _, tensor in sorted(state["tensors"].items()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    updates = state["tensors"]["updates"].tolist()
    return {"bits": digest.hexdigest(), "updates": updates, "vocab_start": tap.explorer.head.vocab_start}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
