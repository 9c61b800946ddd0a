"""Any command as a run on this machine."""
