"""`fisher-jax join`: one report from the parts of a run, or from runs on several texts."""
