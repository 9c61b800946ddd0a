"""The credential vault."""
