"""Quality of dropped models: perplexity, lm-eval's benchmarks, many plans at a time, and text that a model writes."""
