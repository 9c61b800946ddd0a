"""Data files: rows, inspection, token counts; knows no run."""
