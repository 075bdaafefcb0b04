"""Which parameters train, when and at what rate. Needs torch.nn only."""
