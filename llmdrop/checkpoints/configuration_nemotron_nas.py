"""The config of Llamas whose layers differ ("nemotron-nas"), which neither vLLM nor transformers brings along.

In a checkpoint this file is for --trust-remote-code. With llmdrop installed beside vLLM, `register` runs as a plugin
(entry point vllm.general_plugins) and no remote code is needed.
"""

from transformers import AutoConfig, LlamaConfig


class Block(dict):
    """JSON to transformers, an object to the engines, which ask for block.attention.no_op."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return Block(self[name]) if isinstance(self[name], dict) else self[name]


class NemotronNASConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Block(block) for block in block_configs]


def register() -> None:
    """Make the model type known to transformers, and so to vLLM."""
    AutoConfig.register("nemotron-nas", NemotronNASConfig, exist_ok=True)
