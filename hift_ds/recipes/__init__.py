"""What the launch scripts share and the library does not need: models and text data by name."""
