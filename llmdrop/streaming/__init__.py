"""Score and drop checkpoints that are larger than memory, and score with several processes."""
