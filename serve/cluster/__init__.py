"""Several boxes behind one endpoint: each is a gateway with one GPU."""
