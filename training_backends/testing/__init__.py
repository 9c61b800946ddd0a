"""What a backend is tested with: a scriptable server, faults, checks. Needs no pytest."""
