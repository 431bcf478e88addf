"""Which parameters form a block of K-FAC, and how they lie in its matrix."""
