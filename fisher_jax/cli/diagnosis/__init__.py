"""What `fisher-jax doctor` measures: each part of the library on this device, against slow loops."""
