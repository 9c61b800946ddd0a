"""The Mistral protocol served in front of any backend."""
