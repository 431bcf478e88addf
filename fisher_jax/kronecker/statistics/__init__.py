"""Second moments of the inputs and output gradients of every use, over batches and devices."""
