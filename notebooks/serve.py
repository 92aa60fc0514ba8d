"""Score a model, drop layers, export it for the engine that is installed here and serve it (`make serve`)."""

import argparse
import os
import shutil
import sys
from pathlib import Path

import llmdrop
from llmdrop.serving import llama_cpp, vllm_engine

NO_ENGINE = f"""no engine is installed that serves dropped models. One of these is enough:
  {llama_cpp.INSTALL}
  llama-server on the PATH (llama.cpp's own; also in Homebrew, conda-forge, Nix)
  {vllm_engine.INSTALL}"""
QUESTION = '{"messages": [{"role": "user", "content": "Name three planets."}], "max_tokens": 64, "temperature": 0}'


def number(text: str) -> int:
    """make passes what was not given as nothing."""
    return int(text or 0)


def amount(text: str) -> int | float | str:
    """A number of layers, or a share of them, as 0.4 or 40%."""
    if text.endswith("%"):
        return text
    return float(text) if "." in text else number(text)


def layers(text: str) -> list[int]:
    """As 0,29."""
    return [int(part) for part in text.split(",") if part]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    for kind in ("attn", "mlp", "block"):
        parser.add_argument(f"--{kind}", type=amount, default=0, help="how many to drop, or a share as 40%%")
    parser.add_argument("--keep", type=layers, default=[], help="layers that are never dropped, as 0,29")
    parser.add_argument("--port", type=number, default=0)
    given = parser.parse_args()
    given.model = given.model or "smollm2-135m"
    given.port = given.port or 8080
    return given


def drop(model, tokenizer, counts: dict[str, int | float | str], keep: list[int]) -> llmdrop.DropPlan:
    """Drop so many layers of each kind, those that score lowest, for good."""
    calibration = llmdrop.load_calibration("xsum", tokenizer, n_samples=16, seq_len=512)
    scores = llmdrop.Store().score(model, calibration)
    plan = llmdrop.DropPlan(n_layers=len(scores.attn))
    for kind, n in counts.items():
        plan |= llmdrop.plan_drop(scores, kind, n, keep=keep)
    llmdrop.apply_plan(model, plan)
    return plan


def main() -> None:
    given = read_arguments()
    llama_server = shutil.which("llama-server")
    takes_gguf = bool(llama_cpp.installed() or llama_server)
    if not takes_gguf and not vllm_engine.installed():
        sys.exit(NO_ENGINE)

    model, tokenizer = llmdrop.load_model(given.model, dtype="auto")
    plan = drop(model, tokenizer, {"attn": given.attn, "mlp": given.mlp, "block": given.block}, given.keep)
    name = f"{Path(given.model).name}-{plan.label}"
    path = llmdrop.build_dir() / "serve" / (f"{name}.gguf" if takes_gguf else name)
    form = {"format": "gguf", "weights": "f16"} if takes_gguf else {"format": "nemotron-nas"}
    try:
        llmdrop.save_model(model, tokenizer, path, overwrite=True, **form)
    except ValueError as error:  # what the format cannot hold
        sys.exit(str(error))

    to_serve = [str(path), "--port", str(given.port)]
    if llama_cpp.installed():
        command = [sys.executable, "-m", "llmdrop.serving", *to_serve]
    elif llama_server:
        command = [llama_server, "--model", *to_serve]
    else:
        command = [*vllm_engine.program(), "--model", *to_serve]
        command += ["--trust-remote-code", "--served-model-name", name]
    url = f"http://127.0.0.1:{given.port}/v1/chat/completions"
    print(f"{plan.label} of {model.name_or_path}: {plan.to_json()}")
    print(" ".join(command))
    print("\nTry it:\n")
    print(f"curl {url} -H 'Content-Type: application/json' -d '{QUESTION}'\n", flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
