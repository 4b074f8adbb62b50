"""What is shown to a network, and how its paint comes back into the picture with nothing else changed."""
