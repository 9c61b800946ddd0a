"""The toolkit for backends in other packages: everything that an adapter needs, from one place.

Public names are listed in `plugins.pyi` and loaded on first use, so that importing this module
costs next to nothing. They follow semantic versioning, together with the package.
"""

import lazy_loader

# Relative to the package, because the names live in its modules.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__package__, __file__)
