"""Backend for the Mistral fine-tuning protocol, hosted or on your own gateway."""
