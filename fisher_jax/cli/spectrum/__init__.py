"""`fisher-jax spectrum`: the eigenvalues of a curvature."""
