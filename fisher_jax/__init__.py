"""Fisher information of neural networks in JAX, language models first."""

import lazy_loader

# The names and where they live are in __init__.pyi, once.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
