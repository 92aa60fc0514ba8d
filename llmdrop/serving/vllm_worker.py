"""vLLM as a program that answers requests; `vllm_engine` starts it with the Python of vLLM's own environment.

Standard input: a line of JSON with the arguments of vllm.LLM, then one for each request: prompts (lists of token ids),
new_tokens, top. Standard output: a line of JSON when the model is loaded, then one for each request, a list of
continuations as of `vllm_engine.VLLM.complete`. It imports nothing of llmdrop, which may be missing there.
"""

import json
import os
import signal
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes into the log
    sys.path.pop(0)  # modules of llmdrop are no top-level modules
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(sys.stdin.readline()))
    print(json.dumps("loaded"), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        settings = SamplingParams(
            temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, logprobs=request["top"]
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        print(json.dumps([_continuation(out) for out in llm.generate(prompts, settings, use_tqdm=False)]), file=answers)
    os.killpg(0, signal.SIGTERM)  # with whatever vLLM started, also where nobody waits any more


def _continuation(out) -> dict:
    """Of a vllm.RequestOutput."""
    (text,) = out.outputs
    steps = len(text.token_ids) - 1  # the first token is the prefill's
    decode_seconds = out.metrics.last_token_ts - out.metrics.first_token_ts
    return {
        "tokens": list(text.token_ids),
        "top": [[[token, entry.logprob] for token, entry in likeliest.items()] for likeliest in text.logprobs],
        "prefill_seconds": out.metrics.first_token_ts - out.metrics.scheduled_ts,
        "decode_seconds": decode_seconds * len(text.token_ids) / max(steps, 1),
    }


if __name__ == "__main__":
    main()
