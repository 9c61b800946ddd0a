"""API keys and other credentials: lookup and storage."""
