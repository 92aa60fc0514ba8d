"""A fast tokenizer as llama.cpp's metadata, and back. The engine has its own tokenizers, chosen by name."""

import json
import os
import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .extras import import_extra

TokenType = import_extra("gguf", "gguf").TokenType
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


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict:
    """Metadata tokenizer.*: byte-level BPE as in Llama 3, SmolLM, GPT-2 and Qwen 2, SentencePiece's as in Llama 2.

    The whole tokenizer.json goes along (GGUF's own key tokenizer.huggingface.json), from which `read_tokenizer` gets
    exactly the same tokenizer back. Raises ValueError for what llama.cpp has no name for.
    """
    way_out = "Where the undropped model exists as a GGUF, gguf_format.drop_gguf keeps its tokenizer"
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"a GGUF needs a fast tokenizer (one with a tokenizer.json), got {tokenizer!r}. {way_out}")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    if max(vocab.values()) >= vocab_size:
        raise ValueError(f"the tokenizer has {max(vocab.values()) + 1} tokens, the model {vocab_size}: not a pair")
    bpe = whole["model"]
    splits = tuple(_splits(whole["pre_tokenizer"]))
    spaces = _marked_spaces(whole)
    if bpe["type"] != "BPE" or (spaces is None and splits not in PRE_TOKENIZERS):
        raise ValueError(
            f"llama.cpp has no known form of this tokenizer ({bpe['type']}, split by {splits}); known are byte-level "
            f"BPE as in {', '.join(PRE_TOKENIZERS.values())}, and SentencePiece's BPE as in Llama 2. {way_out}"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, i in vocab.items():
        tokens[i] = token
        types[i] = TokenType.NORMAL
    for token in whole["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    if spaces is None:
        if not pairs:
            raise ValueError(
                f"llama.cpp reads no byte-level BPE without merges, and this tokenizer has none. {way_out}"
            )
        form = {"model": "gpt2", "pre": PRE_TOKENIZERS[splits], "merges": [" ".join(pair) for pair in pairs]}
    else:  # the engine merges what scores highest: earlier merges made, up to a scale SentencePiece's own scores
        ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(pairs)))}
        scores = [float(-ranks.get(token, len(pairs))) for token in tokens]
        form = {"model": "llama", "pre": "default", "scores": scores}
        for i, token in enumerate(tokens):
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[i] = TokenType.BYTE
        if bpe["unk_token"] in vocab:
            types[vocab[bpe["unk_token"]]] = TokenType.UNKNOWN
    plain = tokenizer("a").input_ids
    template = tokenizer.chat_template
    form |= {
        "tokens": tokens,
        "token_type": types,
        "add_bos_token": plain[0] == tokenizer.bos_token_id,
        "add_eos_token": plain[-1] == tokenizer.eos_token_id,
        "add_space_prefix": bool(spaces),
    }
    form |= {f"{name}_token_id": getattr(tokenizer, f"{key}_token_id") for key, name in _SPECIAL.items()}
    return {f"tokenizer.ggml.{key}": value for key, value in form.items()} | {
        "tokenizer.chat_template": template.get("default") if isinstance(template, dict) else template,
        "tokenizer.huggingface.json": json.dumps(whole, ensure_ascii=False, separators=(",", ":")),
    }


def _marked_spaces(whole: dict) -> bool | None:
    """Of a tokenizer with ▁ for spaces and bytes for unknown characters, whether text gets a ▁ in front; else None.

    Llama 2's has this as a normalizer or, in newer files, as a pre-tokenizer that does not split.
    """
    pre = whole["pre_tokenizer"]
    normalizer = whole["normalizer"]
    if not whole["model"].get("byte_fallback") or (pre is None) == (normalizer is None):
        return None
    if pre is not None:
        is_metaspace = pre["type"] == "Metaspace" and not pre.get("split", True)
        return pre["prepend_scheme"] != "never" if is_metaspace else None
    steps = {step["type"]: step for step in normalizer.get("normalizers", [normalizer])}
    marks = set(steps) <= {"Replace", "Prepend"} and steps.get("Replace", {}).get("content") == "▁"
    return "Prepend" in steps if marks else None


def _splits(pre: dict | None) -> list[str]:
    """What a pre-tokenizer does, step by step, in the words of PRE_TOKENIZERS."""
    if pre is None:
        return ["nothing"]
    if pre["type"] == "Sequence":
        return [step for inner in pre["pretokenizers"] for step in _splits(inner)]
    if pre["type"] == "ByteLevel" and pre.get("use_regex", True):
        return ["ByteLevel words"]
    if pre["type"] == "Digits" and not pre.get("individual_digits"):
        return ["Digits together"]
    return [pre["pattern"].get("Regex", "a string") if pre["type"] == "Split" else pre["type"]]


def read_tokenizer(path: str | os.PathLike, facts: dict):
    """The tokenizer in a GGUF: exactly the one written, or, in files of others, as transformers reconstructs it."""
    if "tokenizer.huggingface.json" not in facts:
        return AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    special = {}
    for key, name in _SPECIAL.items():
        if f"tokenizer.ggml.{name}_token_id" in facts:
            special[f"{key}_token"] = facts["tokenizer.ggml.tokens"][facts[f"tokenizer.ggml.{name}_token_id"]]
    whole = Tokenizer.from_str(facts["tokenizer.huggingface.json"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, **special)
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    return tokenizer
