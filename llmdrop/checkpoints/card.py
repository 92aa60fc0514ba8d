"""The model card that a saved model brings along: README.md, with the metadata that the hub reads."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache

from ..plan import DropPlan
from ..prune import DROPPED
from .destination import CARD_MARK, is_our_card
from .embedded import ON_THE_HUB

LICENSE = ("license", "license_name", "license_link")
CARD = """---
{metadata}
---
{mark}

# {name}

{origin}, {what}, by [llmdrop](https://arxiv.org/abs/2406.15786). Layers count from 0: `{plan}`

{note}

{usage}
"""


def write_card(folder: Path, name: str, source: str, note: str = "") -> None:
    """Write README.md beside the config.json that is in `folder`.

    name: what the checkpoint will be called. source: `name_or_path` of the model that it was made from; base model and
    license are those of the hub id, or of the card in the source's directory, as far as they are known on this machine.
    note: how the layers were chosen and what that cost, as Markdown.
    """
    config = json.loads((folder / "config.json").read_text())
    record = config.get("llmdrop") or {}
    plan = DropPlan(record.get("attn", ()), record.get("mlp", ()), record.get("n_layers"))
    source = source.removesuffix(DROPPED)
    known = _known(source)
    base = known.get("base_model")
    what = f"{len(plan.attn)} attention layers and {len(plan.mlp)} MLPs of its {plan.n_layers} layers dropped"
    text = CARD.format(
        metadata=ModelCardData(library_name="transformers", tags=["llmdrop"], **known).to_yaml(),
        mark=CARD_MARK,
        name=name,
        origin=f"[{base}](https://huggingface.co/{base})" if base else Path(source).name or config["model_type"],
        what=what if plan else "with all its layers",
        plan=plan.to_json(),
        note=note,
        usage="\n".join(f"- {program}: {how}" for program, how in _usage(name, config).items()),
    )
    (folder / "README.md").write_text(text.replace("\n\n\n", "\n"), encoding="utf-8")


def _known(source: str) -> dict:
    """base_model and license of a model by its name."""
    if not source or source in ON_THE_HUB:
        return ON_THE_HUB.get(source, {})
    repo, _, revision = source.partition("@")
    card = Path(source).expanduser() / "README.md"
    is_local = card.parent.exists() or repo.count("/") != 1
    known = {} if is_local else {"base_model": repo}
    try:
        cached = None if is_local else try_to_load_from_cache(repo, "README.md", revision=revision or None)
        metadata = metadata_load(cached if isinstance(cached, str) else card) or {}
    except Exception:  # none, or one that cannot be read, whoever wrote it: saving does not depend on it
        return known
    carried = (*LICENSE, "base_model") if is_our_card(card) else LICENSE
    return known | {key: metadata[key] for key in carried if key in metadata}


def _usage(name: str, config: dict) -> dict[str, str]:
    """How to load and serve a checkpoint with this config.json, program by program."""
    undropped = (config.get("llmdrop") or {}).get("undropped", config)
    usage = {"llmdrop": f'`model, tokenizer = llmdrop.load_model("{name}")`'}
    if config["model_type"] == "nemotron-nas":
        return usage | {"vLLM": f"`vllm serve {name} --trust-remote-code`"}
    auto = "AutoModelForImageTextToText" if "text_config" in config else "AutoModelForCausalLM"
    if "auto_map" not in config:
        return usage | {"transformers": f'`{auto}.from_pretrained("{name}")`', "vLLM": f"`vllm serve {name}`"}
    usage["transformers"] = f'`{auto}.from_pretrained("{name}", trust_remote_code=True)`, without llmdrop'
    if undropped["model_type"] in ("llama", "mistral") and "quantization_config" not in config:
        usage["llama.cpp"] = f'`llmdrop.save_model(model, tokenizer, "{name}.gguf", format="gguf", weights="q8_0")`'
        usage["vLLM"] = f'`llmdrop.save_model(model, tokenizer, "{name}-nas", format="nemotron-nas")`, then serve that'
    return usage
