"""Many servers behind one address: one for each GPU, on this machine and others; by Ray Serve (extra `cluster`)."""
