"""`group_fisher` and its ways to per-token squares."""
