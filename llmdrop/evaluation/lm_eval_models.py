"""lm-eval model classes: a sweep of drop plans, and one dropped model for lm-eval's own command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..calibration import load_calibration
from ..checkpoints.load import load_model
from ..plan import DropPlan, as_plan, plan_drop
from ..prune import apply_plan, dropped
from ..scoring import score
from .sweep import Item, loglikelihoods


class SweepLM(HFLM):
    """An lm-eval model that answers log-likelihood requests for a whole sweep of drop plans at once.

    Tokenization, truncation and metrics are lm-eval's. Requests that repeat are answered once. `current` names the
    plan whose answers are given. `n_scored` tells how many tokens each (context, continuation) was scored on.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        plans: Mapping[str, DropPlan],
        batch_size: int = 8,
        progress: bool = True,
        label: str = "evaluate",
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.plans = dict(plans)
        self.current = next(iter(plans))
        self.progress = progress
        self.label = label
        self.n_scored: dict[tuple[str, str], int] = {}
        self.answers: dict[tuple, list[tuple[float, bool]]] = {}  # (tokens, number scored) -> one answer per plan

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs) -> list[tuple[float, bool]]:
        keys = []
        for texts, context, continuation in requests:
            tokens = tuple((context + continuation)[-(self.max_length + 1) :])  # too long: cut from the left
            keys.append((tokens, len(continuation)))
            self.n_scored[texts] = len(continuation)
        missing = [key for key in dict.fromkeys(keys) if key not in self.answers]
        if missing:
            items = [Item(*key) for key in missing]
            plans = list(self.plans.values())
            sums, greedy = loglikelihoods(self.model, plans, items, progress=self.progress, label=self.label)
            for key, values, matches in zip(missing, sums.T.tolist(), greedy.T.tolist(), strict=True):
                self.answers[key] = list(zip(values, matches, strict=True))
        place = list(self.plans).index(self.current)
        return [self.answers[key][place] for key in keys]

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        with dropped(self.model, self.plans[self.current]):
            return super().generate_until(requests, disable_tqdm)


@register_model("llmdrop")
class DroppedLM(SweepLM):
    """One model with layers dropped, by lm-eval model arguments (see `llmdrop.evaluation.__main__`).

    pretrained, kwargs: name and settings (revision, subfolder, ...) for `load_model`. drop_*: how many of each to drop
    (or what share, as 40%), none of the layers in keep=[0,29], by scores on `n_samples` x `seq_len` tokens of
    `calibration`; or plan: a .json file with one. device: as lm-eval's own model class takes it, whose command line
    says cuda:0 unless told: without CUDA, what else is there. Raises ValueError for counts the model does not have.
    """

    def __init__(
        self,
        pretrained: str,
        drop_attn: int | float | str = 0,
        drop_mlp: int | float | str = 0,
        drop_block: int | float | str = 0,
        drop_joint: int | float | str = 0,
        keep: Sequence[int] = (),
        plan: str | None = None,
        calibration: str = "xsum",
        n_samples: int = 16,
        seq_len: int = 512,
        seed: int = 0,
        data_dir: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        **kwargs,
    ):
        if not device or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"
        model, tokenizer = load_model(pretrained, dtype=dtype, device=device, **kwargs)
        counts = {"attn": drop_attn, "mlp": drop_mlp, "block": drop_block, "joint": drop_joint}
        chosen = DropPlan()
        if plan:
            chosen = as_plan(Path(plan))
        elif any(counts.values()):
            text = load_calibration(calibration, tokenizer, n_samples, seq_len, seed, data_dir)
            scores = score(model, text)
            for target, count in counts.items():
                chosen |= plan_drop(scores, target, count, keep=keep)
        apply_plan(model, chosen)
        super().__init__(model, tokenizer, {chosen.label: DropPlan()}, batch_size)
