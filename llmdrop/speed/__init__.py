"""How fast a model is: measured, as its bytes and FLOPs allow, and by the shapes of the paper's models."""
