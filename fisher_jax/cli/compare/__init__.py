"""`fisher-jax compare`: two tasks of reports against one another."""
