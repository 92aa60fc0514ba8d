"""A fast tokenizer as llama.cpp's metadata, and back. The engine has its own tokenizers, chosen by name."""

import json
import os
import re
from pathlib import Path

from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerFast

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Byte-level BPE by what splits text before merging -> llama.cpp's name for it (tokenizer.ggml.pre)
PRE_TOKENIZERS = {
    ("ByteLevel words",): "gpt-2",
    ("Digits", "ByteLevel words"): "smollm",
    (_LLAMA3, "ByteLevel"): "llama-bpe",
    (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), "ByteLevel"): "qwen2",
}


_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_facts(tokenizer, vocab_size: int) -> dict:
    """Metadata tokenizer.*: byte-level BPE as in Llama 3, SmolLM, GPT-2 and Qwen 2, SentencePiece's BPE as in Llama 2
    and Mistral, with chat template and special tokens.

    The whole tokenizer.json goes along as tokenizer.huggingface.json (GGUF's own key), from which `read_tokenizer` gets
    exactly the same tokenizer back. Raises ValueError for what llama.cpp has no name for.
    """
    way_out = (
        "Where the undropped model exists as a GGUF, gguf_format.drop_gguf(source, plan, path) keeps its tokenizer"
    )
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"a GGUF needs a fast tokenizer (one with a tokenizer.json), got {tokenizer!r}. {way_out}")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    if len(vocab) > vocab_size or max(vocab.values()) >= vocab_size:
        raise ValueError(f"the tokenizer has {max(vocab.values()) + 1} tokens, the model {vocab_size}: not a pair")
    kind, splits, spaces = whole["model"]["type"], tuple(_splits(whole["pre_tokenizer"])), _marked_spaces(whole)
    if kind != "BPE" or (spaces is None and splits not in PRE_TOKENIZERS):
        raise ValueError(
            f"llama.cpp has no known form of this tokenizer ({kind}, split by {splits}); known are byte-level BPE as "
            f"in {', '.join(PRE_TOKENIZERS.values())}, and SentencePiece's BPE as in Llama 2. {way_out}"
        )
    added = {token["id"]: token for token in whole["added_tokens"]}
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in vocab.items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
        if i in added:
            types[i] = int(TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in whole["model"]["merges"]]
    if spaces is None:
        form = {"model": "gpt2", "pre": PRE_TOKENIZERS[splits], "merges": [" ".join(pair) for pair in pairs]}
    else:  # the engine merges what scores highest: earlier merges made, up to a scale SentencePiece's own scores
        ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(pairs)))}
        scores = [float(-ranks.get(token, len(pairs))) for token in tokens]
        for i, token in enumerate(tokens):
            if token == whole["model"]["unk_token"]:
                types[i] = int(TokenType.UNKNOWN)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[i] = int(TokenType.BYTE)
        form = {"model": "llama", "pre": "default", "scores": scores}
    plain = tokenizer("a").input_ids
    template = tokenizer.chat_template
    facts = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": plain[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": plain[-1] == tokenizer.eos_token_id,
        "tokenizer.ggml.add_space_prefix": bool(spaces),
        "tokenizer.chat_template": template.get("default") if isinstance(template, dict) else template,
        "tokenizer.huggingface.json": json.dumps(whole, ensure_ascii=False, separators=(",", ":")),
    }
    facts |= {f"tokenizer.ggml.{key}": value for key, value in form.items()}
    return facts | {
        f"tokenizer.ggml.{name}_token_id": getattr(tokenizer, f"{key}_token_id") for key, name in _SPECIAL.items()
    }


def _marked_spaces(whole: dict) -> bool | None:
    """Of a tokenizer with ▁ for spaces and bytes for unknown characters, whether text gets a ▁ in front; else None.

    Llama 2's has this as a normalizer or, in newer files, as a pre-tokenizer that does not split.
    """
    if not whole["model"].get("byte_fallback"):
        return None
    pre, normalizer = whole["pre_tokenizer"], whole["normalizer"]
    if pre is None and normalizer is not None:
        steps = {step["type"]: step for step in normalizer.get("normalizers", [normalizer])}
        marks = set(steps) <= {"Replace", "Prepend"} and steps.get("Replace", {}).get("content") == "▁"
        return "Prepend" in steps if marks else None
    if normalizer is None and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        return pre["prepend_scheme"] != "never"
    return None


def _splits(pre: dict | None) -> list[str]:
    """What a pre-tokenizer does, step by step, in the words of PRE_TOKENIZERS."""
    if pre is None:
        return ["nothing"]
    if pre["type"] == "Sequence":
        return [step for inner in pre["pretokenizers"] for step in _splits(inner)]
    if pre["type"] == "ByteLevel":
        return ["ByteLevel words" if pre.get("use_regex", True) else "ByteLevel"]
    if pre["type"] == "Digits":
        return ["Digits" if pre.get("individual_digits") else "Digits together"]
    return [pre["pattern"].get("Regex", "a string") if pre["type"] == "Split" else pre["type"]]


def read_tokenizer(path: str | os.PathLike, facts: dict):
    """The tokenizer in a GGUF: exactly the one written, or, in files of others, as transformers reconstructs it."""
    if "tokenizer.huggingface.json" not in facts:
        return AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    from tokenizers import Tokenizer

    tokens, ids = facts["tokenizer.ggml.tokens"], {}
    for key, name in _SPECIAL.items():
        if f"tokenizer.ggml.{name}_token_id" in facts:
            ids[f"{key}_token"] = tokens[facts[f"tokenizer.ggml.{name}_token_id"]]
    out = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(facts["tokenizer.huggingface.json"]), **ids)
    out.chat_template = facts.get("tokenizer.chat_template")
    return out
