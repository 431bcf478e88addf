"""`fisher-jax doctor`: each part of the library on this device, against slow loops."""
