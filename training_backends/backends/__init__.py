"""One folder a backend; none imports another."""
