"""The model card that a saved model brings along: README.md, with the metadata that the hub reads."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache

from ..plan import DropPlan
from ..prune import DROPPED
from .destination import CARD_MARK, is_our_card
from .embedded import ON_THE_HUB

CARD = """---
{metadata}
---
{mark}

# {name}

{origin}, {what}. Saved by llmdrop, after [Not All Attention is Needed](https://arxiv.org/abs/2406.15786).

{note}

{usage}
"""


def write_card(folder: Path, name: str, source: str, note: str = "") -> None:
    """Write README.md beside the config.json in `folder`, of a checkpoint that will be called `name`.

    source: `name_or_path` of the model that it was made from; base model and license are those of the hub id, or of the
    card in the source's directory, as far as they are known on this machine. note: more to say, as Markdown.
    """
    config = json.loads((folder / "config.json").read_text())
    record = config.get("llmdrop") or {}
    plan = DropPlan(record.get("attn", ()), record.get("mlp", ()), record.get("n_layers"))
    source = source.removesuffix(DROPPED)
    known = _known(source)
    base = known.get("base_model")
    text = CARD.format(
        metadata=ModelCardData(library_name="transformers", tags=["llmdrop"], **known).to_yaml(),
        mark=CARD_MARK,
        name=name,
        origin=f"[{base}](https://huggingface.co/{base})" if base else Path(source).name or config["model_type"],
        what=f"without these attention layers and MLPs, counted from 0: `{plan.to_json()}`"
        if plan
        else "with all its layers",
        note=note,
        usage="\n".join(_usage(name, config)),
    )
    (folder / "README.md").write_text(text.replace("\n\n\n", "\n"), encoding="utf-8")


def _known(source: str) -> dict:
    """base_model and license of a model by its name."""
    if not source or source in ON_THE_HUB:
        return ON_THE_HUB.get(source, {})
    repo, _, revision = source.partition("@")
    card = Path(source).expanduser() / "README.md"
    known = {} if card.parent.exists() or repo.count("/") != 1 else {"base_model": repo}
    try:
        cached = try_to_load_from_cache(repo, "README.md", revision=revision or None) if known else None
        metadata = metadata_load(cached or card) or {}
    except Exception:  # no card, or one that cannot be read, whoever wrote it: saving does not depend on it
        return known
    carried = ["license", "license_name", "license_link"] + ["base_model"] * is_our_card(card)
    return known | {key: metadata[key] for key in carried if key in metadata}


def _usage(name: str, config: dict) -> list[str]:
    """How to load and serve a checkpoint with this config.json, program by program."""
    usage = [f'- llmdrop: `model, tokenizer = llmdrop.load_model("{name}")`']
    if config["model_type"] == "nemotron-nas":
        return [*usage, f"- vLLM: `vllm serve {name} --trust-remote-code`"]
    auto = "AutoModelForImageTextToText" if "text_config" in config else "AutoModelForCausalLM"
    is_ordinary = "auto_map" not in config
    arguments = f'("{name}")' if is_ordinary else f'("{name}", trust_remote_code=True)'
    read = [f"`{cls}.from_pretrained{arguments}`" for cls in (auto, "AutoTokenizer")]
    usage += [f"- transformers, without llmdrop: {read[0]}, {read[1]}"]
    if is_ordinary:
        return [*usage, f"- vLLM: `vllm serve {name}`"]
    if config["llmdrop"]["undropped"]["model_type"] in ("llama", "mistral") and "quantization_config" not in config:
        save = f'llmdrop.save_model(model, tokenizer, "{name}'
        usage += [f'- llama.cpp: `{save}.gguf", format="gguf", weights="q8_0")`']
        usage += [f'- vLLM: `{save}-nas", format="nemotron-nas")`, then serve that']
    return usage
