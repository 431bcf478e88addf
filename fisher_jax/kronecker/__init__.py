"""K-FAC: Kronecker factors of the Fisher matrix, their damped inverses, and the optax transformation."""
