"""Where runs live: the clients, the journal and the store."""
