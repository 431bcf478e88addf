"""`fisher-jax train`: optimizers side by side on a small model."""
