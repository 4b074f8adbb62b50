"""Weights: read or mapped, parked and woken; numbers that must stay finite."""
