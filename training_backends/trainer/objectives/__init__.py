"""What a training step minimizes, one module a method."""
