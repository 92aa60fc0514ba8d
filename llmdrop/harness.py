"""The model class through which lm-eval sees a sweep of drop plans."""

from collections.abc import Mapping

from lm_eval.models.huggingface import HFLM

from .plan import DropPlan
from .sweep import Item, loglikelihoods


class SweepLM(HFLM):
    """An lm-eval model that answers log-likelihood requests for a whole sweep of drop plans at once.

    Tokenisation, truncation and metrics are lm-eval's. Requests that repeat are answered once. `current` names the
    plan whose answers are given; text generation runs on the model as it stands.
    """

    def __init__(self, model, tokenizer, plans: Mapping[str, DropPlan], batch_size: int = 8, progress: bool = True):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.plans, self.current, self.progress = dict(plans), next(iter(plans)), progress
        self.answers: dict[tuple, list[tuple[float, bool]]] = {}  # (tokens, number scored) -> one answer per plan

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs) -> list[tuple[float, bool]]:
        keys = []
        for _, context, continuation in requests:
            tokens = tuple((context + continuation)[-(self.max_length + 1) :])  # too long: cut from the left
            keys.append((tokens, len(continuation)))
        missing = [key for key in dict.fromkeys(keys) if key not in self.answers]
        if missing:
            items = [Item(*key) for key in missing]
            sums, greedy = loglikelihoods(self.model, list(self.plans.values()), items, progress=self.progress)
            for k, key in enumerate(missing):
                self.answers[key] = list(zip(sums[:, k].tolist(), greedy[:, k].tolist(), strict=True))
        place = list(self.plans).index(self.current)
        return [self.answers[key][place] for key in keys]
