"""Run exports in the engines that people serve with, compare them there with the model, and time them."""
