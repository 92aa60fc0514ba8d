"""Score a model, drop layers, export it for the engine that is installed here and serve it (`make serve`)."""

import argparse
import os
import shutil
import sys

import llmdrop
from llmdrop.serving import llama_cpp as serving
from llmdrop.serving import vllm_engine as serving_vllm

ENGINES = """no engine is installed that serves dropped models. One of these is enough:
  {install}
  llama-server on the PATH (llama.cpp's own; also in Homebrew, conda-forge, Nix)
  {vllm}"""


def number(text: str) -> int:
    return int(text or 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=lambda text: text or "smollm2-135m", default="smollm2-135m")
    for name in ("attn", "mlp", "block"):
        parser.add_argument(f"--{name}", type=number, default=0, help="how many to drop")
    parser.add_argument("--port", type=lambda text: number(text) or 8080, default=8080)
    args = parser.parse_args()
    vllm, server = serving_vllm.installed(), shutil.which("llama-server")
    here = serving.installed()
    if not (here or server or vllm):
        sys.exit(ENGINES.format(install=serving.INSTALL, vllm=serving_vllm.INSTALL))

    model, tokenizer = llmdrop.load_model(args.model)
    calibration = llmdrop.load_calibration("xsum", tokenizer, n_samples=16, seq_len=512)
    scores = llmdrop.Store().score(model, calibration)
    plan = llmdrop.DropPlan(n_layers=len(scores.attn))
    for kind in ("attn", "mlp", "block"):
        plan |= llmdrop.plan_drop(scores, kind, getattr(args, kind))
    llmdrop.apply_plan(model, plan)

    name = f"{os.path.basename(args.model.rstrip('/'))}-{plan.label}"
    path = llmdrop.build_dir() / "serve" / (f"{name}.gguf" if here or server else name)
    settings = {"format": "gguf", "weights": "f16"} if here or server else {"format": "nemotron-nas"}
    try:
        llmdrop.save_model(model, tokenizer, path, overwrite=True, **settings)
    except ValueError as error:
        sys.exit(str(error))
    if here:
        command = [sys.executable, serving.__file__, str(path), "--port", str(args.port)]
    elif server:
        command = [server, "--model", str(path), "--port", str(args.port)]
    else:
        command = [*serving_vllm.program(), "--model", str(path), "--port", str(args.port), "--trust-remote-code"]
        command += ["--served-model-name", name]
    print(f"{plan.label} of {model.name_or_path}: {plan.to_json()}\n{' '.join(command)}\n\nTry it:\n")
    body = '{"messages": [{"role": "user", "content": "Name three planets."}], "max_tokens": 64, "temperature": 0}'
    print(f"curl http://127.0.0.1:{args.port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n")
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
