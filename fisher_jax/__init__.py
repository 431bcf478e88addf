"""Fisher information of neural networks in JAX."""
