"""Documents to measure on: corpora, text files, packed rows, held-out text."""
