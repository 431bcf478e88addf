"""Natural gradients against tuned rivals: a deep autoencoder, a language model of bytes, one with 49,152 tokens.

    uv run python experiments/natural_gradient.py                  # all three; writes results/
    uv run python experiments/natural_gradient.py --steps-only     # curves, which do not depend on load
    uv run python experiments/natural_gradient.py --timing-only    # seconds, for curves that are there
    uv run python experiments/natural_gradient.py --quick          # do they run? numbers mean nothing

Each alone: `natural_gradient_autoencoder.py`, `natural_gradient_language.py bytes` and `... head`.
"""

import sys

import natural_gradient_autoencoder
import natural_gradient_language

if __name__ == "__main__":
    natural_gradient_autoencoder.main(sys.argv[1:])
    for task in natural_gradient_language.SETTINGS:
        natural_gradient_language.main([task, *sys.argv[1:]])
