"""The backend that trains on this machine."""
