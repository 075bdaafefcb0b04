"""The tools that people train with: nothing else of hift_ds imports Trainer, Accelerate or TRL to drive them."""
