"""Checkpoints: a layout per parameter that any number of ranks and any ZeRO stage can read."""
