"""What `llmdrop.serving` uses of vLLM's Python API, by its documented names, computed by transformers.

It stands in vLLM's environment where the real one is not installed, and runs exports for real.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import llmdrop


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 16
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


@dataclass
class RequestStateStats:
    scheduled_ts: float
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]
    metrics: RequestStateStats | None


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool | None = None,
        disable_log_stats: bool = True,
    ):
        print("this is vLLM, which prints to standard output")
        engine_core = subprocess.Popen(["sleep", "600"])  # it is not alone
        print(f"processes {engine_core.pid}", file=sys.stderr, flush=True)
        self.model, _ = llmdrop.load_model(model, dtype=dtype, device="cpu")
        self.max_model_len = max_model_len
        self.disable_log_stats = disable_log_stats
        config = json.loads(Path(model, "config.json").read_text())
        assert config["architectures"] == ["DeciLMForCausalLM"]
        n_attention = sum(not block["attention"]["no_op"] for block in config["block_configs"])
        token_bytes = n_attention * 2 * config["num_key_value_heads"] * config["head_dim"] * self.model.dtype.itemsize
        print(f"GPU KV cache size: {kv_cache_memory_bytes // token_bytes:,} tokens", file=sys.stderr, flush=True)

    def generate(self, prompts: list[dict], sampling_params: SamplingParams, use_tqdm: bool = True):
        return [self._generate(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    @torch.inference_mode()
    def _generate(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        assert params.temperature == 0 and params.ignore_eos
        if len(ids) + params.max_tokens > self.max_model_len:
            raise ValueError(f"a prompt of {len(ids)} tokens is too long for {self.max_model_len}")
        out = CompletionOutput()
        stats = RequestStateStats(time.monotonic())
        step, past = torch.tensor([ids]), None
        for _ in range(params.max_tokens):
            result = self.model(step, past_key_values=past, use_cache=True, logits_to_keep=1)
            best = result.logits[0, -1].float().log_softmax(-1).topk(params.logprobs)
            step, past = best.indices[None, :1], result.past_key_values
            stats.last_token_ts = time.monotonic()
            stats.first_token_ts = stats.first_token_ts or stats.last_token_ts
            out.token_ids.append(int(best.indices[0]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            out.logprobs.append({token: Logprob(value) for token, value in pairs})
        return RequestOutput([out], None if self.disable_log_stats else stats)
