"""`fisher-jax report`: importance over a corpus, kept as tasks of one folder."""
