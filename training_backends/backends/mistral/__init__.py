"""Training through the Mistral fine-tuning protocol, hosted or on your own gateway."""
