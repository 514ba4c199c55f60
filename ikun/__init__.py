"""Spiking networks and the curvature of their loss."""
