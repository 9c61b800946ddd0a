"""Backend for the OpenAI fine-tuning protocol: OpenAI, Azure, Nebius or your own server."""
