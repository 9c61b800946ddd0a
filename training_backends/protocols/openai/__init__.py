"""The OpenAI fine-tuning protocol for clients and servers; no I/O."""
