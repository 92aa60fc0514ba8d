"""The results store: a measurement is made once, and kept with the facts of how it was made."""

import hashlib
import inspect
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from .evaluate import evaluate_sweep
from .fingerprint import model_key, provenance, speed_key, tokenizer_digest, version
from .models import build_dir
from .plan import DropPlan
from .scoring import ImportanceScores, score
from .speed import compare_speed, measure_speed
from .sweep import perplexity_sweep
from .tasks import task_digest


class Store:
    """Measurements as JSON files, `<root>/<kind>/<slug>-<digest>.json`; root defaults to `build_dir()/results`.

    A file holds the key (all that could change the value, hence its name), the value, the provenance and a checksum.
    It is complete or absent, also after SIGKILL or on a full disk, and processes that want the same measurement at
    the same time make it once. A damaged file is set aside as `*.damaged`, with a warning, and measured again.
    """

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = Path(root) if root is not None else build_dir() / "results"

    def get(self, kind: str, key: dict, compute: Callable, slug: str = "", facts: Callable[[], dict] = provenance):
        """The stored value for this key, or compute() now, stored; always as JSON gives it back (lists, not tuples).

        kind: the folder. key: anything JSON can write; the order of its entries does not matter. slug: for people.
        facts: makes the provenance to store.
        Raises TypeError if key or value cannot be written as JSON, OSError if the file cannot be written.
        """
        return self.get_many(kind, [(key, slug)], lambda missing: [compute()], facts)[0]

    def get_many(
        self,
        kind: str,
        wanted: list[tuple[dict, str]],
        compute: Callable[[list[int]], Iterable],
        facts: Callable[[], dict] = provenance,
    ) -> list:
        """Values for many (key, slug) at once; compute(indices of the missing ones) yields their values in order.

        Each value is stored as soon as it is yielded. Of equal keys only the first is computed.
        """
        if not re.fullmatch(r"[a-z0-9_-]+", kind):
            raise ValueError(f"kind {kind!r} names a folder; use a-z, 0-9, _ and -")
        texts = [_json(key, "key") for key, _ in wanted]
        digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
        first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
        values = {digest: self._read(kind, digest, texts[i]) for digest, i in first.items()}
        missing = sorted(digest for digest, found in values.items() if found is None)
        if missing:
            with ExitStack() as locks:
                for digest in missing:  # sorted, so that two processes never wait for each other
                    locks.callback(self._lock(kind, digest, wanted[first[digest]][1]).release)
                for digest in missing:  # another process may have measured while this one waited
                    values[digest] = self._read(kind, digest, texts[first[digest]], set_aside=True)
                indices = sorted(first[digest] for digest in missing if values[digest] is None)
                if indices:
                    self._measure(kind, wanted, digests, indices, compute, facts, values)
        return [json.loads(values[digest]) for digest in digests]

    def _measure(self, kind, wanted, digests, indices, compute, facts, values) -> None:
        print(f"measuring {kind}: {', '.join(wanted[i][1] or digests[i] for i in indices)} ...", end="", flush=True)
        start = time.perf_counter()
        beside = facts()
        try:
            for i, value in zip(indices, compute(indices), strict=True):
                values[digests[i]] = _json(value, "value")
                record = {
                    "key": json.loads(_json(wanted[i][0], "key")),
                    "value": json.loads(values[digests[i]]),
                    "provenance": beside,
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
                record["checksum"] = _checksum(record)
                slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", wanted[i][1]).strip("-")[:100]
                _write(self.root / kind / f"{slug}{'-' if slug else ''}{digests[i]}.json", record)
        finally:
            print(f" {time.perf_counter() - start:.1f} s", flush=True)

    def _read(self, kind: str, digest: str, key: str, set_aside: bool = False) -> str | None:
        """The stored value as JSON text, or None. A damaged file is touched only by the holder of its lock."""
        for file in (self.root / kind).glob(f"*{digest}.json"):
            try:
                record = json.loads(file.read_bytes())
                if record["checksum"] == _checksum(record) and _json(record["key"], "key") == key:
                    return _json(record["value"], "value")
                reason = "its content does not match its checksum or its key"
            except FileNotFoundError:  # set aside by another process since the listing
                continue
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            if set_aside:
                aside = file.with_name(file.name + ".damaged")
                os.replace(file, aside)
                warnings.warn(f"{file} is damaged ({reason}); set aside as {aside.name}, measuring again", stacklevel=4)
        return None

    def _lock(self, kind: str, digest: str, slug: str) -> FileLock:
        folder = self.root / kind / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{digest}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is measuring {kind} {slug or digest}; waiting for it", flush=True)
            lock.acquire()
        return lock

    # ---- measurements of this library; model is always the undropped one

    def score(self, model, calibration, batch_size: int = 8, **settings) -> ImportanceScores:
        """`llmdrop.score`, stored. settings: with_residual, gap."""
        apart = ("model", "calibration", "batch_size", "progress", "stream_weights", "distributed")  # not stored
        settings = _with_defaults([score], settings, *apart)
        key = model_key(model, batch_size, "scoring", "hooks", "anatomy") | {"calibration": calibration.digest}
        value = self.get(
            "score",
            key | settings,
            lambda: json.loads(score(model, calibration, batch_size=batch_size, **settings).to_json()),
            f"{_name(model)}-{_short(calibration)}",
            lambda: provenance(model, calibration, batch_size=batch_size, **settings),
        )
        return ImportanceScores.from_json(json.dumps(value))

    def perplexity(self, model, plans: Mapping[str, DropPlan], calibration, batch_size: int = 8) -> pd.DataFrame:
        """`llmdrop.perplexity_sweep`, each plan stored on its own; batch_size changes nothing."""
        key = model_key(model, 0, "sweep", "prune", "anatomy") | {"calibration": calibration.digest}
        names = list(plans)

        def compute(missing: list[int]) -> list[dict]:
            frame = perplexity_sweep(model, {str(i): plans[names[i]] for i in missing}, calibration)
            return frame.drop(columns="plan").to_dict("records")

        values = self.get_many(
            "perplexity",
            [(key | _plan_key(plan), f"{_name(model)}-{plan.label}-{_short(calibration)}") for plan in plans.values()],
            compute,
            lambda: provenance(model, calibration),
        )
        return pd.DataFrame([{"plan": name} | value for name, value in zip(names, values, strict=True)])

    def evaluate(
        self,
        model,
        tokenizer,
        plans: Mapping[str, DropPlan],
        tasks: Sequence[str],
        limit: int | None = None,
        data_dir: str | os.PathLike | None = None,
        num_fewshot: int | Mapping[str, int] | None = None,
        batch_size: int = 8,
    ) -> pd.DataFrame:
        """`llmdrop.evaluate_sweep`, each plan and task stored on its own, in one sweep per task.

        Returns plan, task, metric, value, stderr, n, num_fewshot, version.
        """
        modules = ("evaluate", "harness", "sweep", "tasks", "prune", "anatomy")
        key = model_key(model, batch_size, *modules) | {"limit": limit, "lm_eval": version("lm_eval")}
        key |= {"tokenizer": tokenizer_digest(tokenizer)}
        digests = {task: task_digest(task, data_dir, num_fewshot) for task in tasks}  # all are good before we start
        names, rows = list(plans), []
        for task, digest in digests.items():

            def compute(missing: list[int], task=task) -> list[list[dict]]:
                chosen = {str(i): plans[names[i]] for i in missing}
                frame = evaluate_sweep(model, tokenizer, chosen, [task], limit, data_dir, num_fewshot, batch_size)
                columns = ["metric", "value", "stderr", "n", "num_fewshot", "version"]
                return [frame.loc[frame["plan"] == str(i), columns].to_dict("records") for i in missing]

            slug = f"{_name(model)}-{{}}-{task}{'' if limit is None else f'-{limit}'}"
            key |= {"task": task, "task_digest": digest}
            wanted = [(key | _plan_key(plan), slug.format(plan.label)) for plan in plans.values()]
            values = self.get_many("evaluate", wanted, compute, lambda: provenance(model))
            for name, value in zip(names, values, strict=True):
                rows += [{"plan": name, "task": task} | row for row in value]
        return pd.DataFrame(rows)

    def speed(self, model, plans: Mapping[str, DropPlan], **settings) -> pd.DataFrame:
        """`llmdrop.compare_speed`, stored for these plans together, since they are timed in turn.

        settings: rounds, batch_size, prompt_len, new_tokens, cache, seed. Weights do not enter the key, shapes do.
        """
        functions = compare_speed, measure_speed
        settings = _with_defaults(functions, settings, "model", "plans", "settings", "repeats")
        key = speed_key(model, "speed", "prune", "anatomy") | settings
        key["plans"] = [_plan_key(plan) for plan in plans.values()]
        rows = self.get(
            "speed",
            key,
            lambda: compare_speed(model, plans, **settings).drop(columns="plan").to_dict("records"),
            f"{_name(model)}-{'-'.join(plan.label for plan in plans.values())}",
            lambda: provenance(model, **settings),
        )
        return pd.DataFrame([{"plan": name} | row for name, row in zip(plans, rows, strict=True)])


def _json(value, what: str) -> str:
    """A key in one canonical spelling (sorted, no NaN), a value in its own order."""
    try:
        return json.dumps(value, sort_keys=what == "key", allow_nan=what == "value", separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"the {what} of a measurement must be plain JSON (dict, list, str, number): {error}") from error


def _checksum(record: dict) -> str:
    parts = [record["key"], record["value"], record["provenance"], record["created"]]
    return hashlib.sha256(_json(parts, "value").encode()).hexdigest()


def _write(file: Path, record: dict) -> None:
    temporary = file.with_name(file.name + ".tmp")  # one writer: the holder of the lock
    try:
        with open(temporary, "wb") as out:
            out.write(json.dumps(record, indent=1).encode())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"cannot store the measurement {file}: {error.strerror}. Make room there (or set LLMDROP_BUILD to another "
            "disk) and run again; what was stored before is kept",
        ) from error


def _with_defaults(functions: Sequence[Callable], settings: Mapping, *apart: str) -> dict:
    """settings with the functions' defaults filled in, so that saying a default and not saying it are one key."""
    known = {name: p.default for function in functions for name, p in inspect.signature(function).parameters.items()}
    known = {name: default for name, default in known.items() if name not in apart}
    unknown = ", ".join(sorted(set(settings) - set(known)))
    if unknown:
        raise TypeError(f"unknown setting {unknown} of {functions[0].__name__}; allowed: {', '.join(known)}")
    return known | dict(settings)


def _plan_key(plan: DropPlan) -> dict:
    return {"attn": list(plan.attn), "mlp": list(plan.mlp)}


def _name(model) -> str:
    return Path(str(model.name_or_path)).name or model.config.model_type


def _short(calibration) -> str:
    n, length = calibration.input_ids.shape
    return f"{calibration.source.split(' ')[0]}-{n}x{length}"
