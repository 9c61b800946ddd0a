"""The Mistral fine-tuning protocol, both directions; no I/O."""
