"""HTTP for every backend: the only place that imports httpx. Knows no provider."""
