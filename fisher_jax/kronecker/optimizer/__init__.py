"""K-FAC as optax transformations: steps, refreshes, rates and damping."""
