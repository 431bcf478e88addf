"""`fisher-jax cache`: dequantised weights of GGUF files, kept for the next start."""
