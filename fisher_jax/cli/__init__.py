"""The ``fisher-jax`` command: which vocabulary tokens of a real language model matter."""
