"""`fisher-jax trim`: a model with a smaller vocabulary."""
