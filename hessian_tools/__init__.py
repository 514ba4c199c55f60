"""Curvature of trained networks: operators, Lanczos, spectra, traces, figures. Works on any torch model."""
