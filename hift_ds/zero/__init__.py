"""One step on this rank, on top of ZeRO 0-3: gradients, update, checkpoint."""
