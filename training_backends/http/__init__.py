"""HTTP for every backend, independent of the provider; the only package that imports httpx."""
