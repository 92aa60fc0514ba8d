"""Ways to make a model smaller or faster, and to lose less by it, that can be undone: each is a part of a `Variant`.

Reconstruction and healing make up for dropped sublayers; search and Shortened LLaMA choose them; windows, Wanda's masks
and 4-bit weights are other things to do to a model, or to compare dropping with.
"""
