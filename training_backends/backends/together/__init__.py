"""Backend for Together AI."""
