"""What arrives and what leaves."""
