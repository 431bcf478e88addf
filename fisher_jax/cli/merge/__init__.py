"""`fisher-jax merge`: one model out of several."""
