"""What was asked, resolved once: the "hift" section, DeepSpeed's keys and what they mean together."""
