"""Fine-tuning that outlives the provider: one interface, any backend.

Public names are listed in `__init__.pyi` and loaded on first use, so that importing the package
costs next to nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
