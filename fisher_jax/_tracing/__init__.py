"""What a model's program says of its parameters: where each is used, and what its axes are."""
