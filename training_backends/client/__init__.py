"""The clients: launch, observe, control and record training runs."""
