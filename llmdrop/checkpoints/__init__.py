"""Get models from and write them to files: transformers, nemotron-nas (vLLM), GGUF (llama.cpp), 4-bit weights."""
