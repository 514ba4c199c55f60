"""Errors that the user can correct."""

from __future__ import annotations


class UsageError(ValueError):
    """An option, a file or a function given by the user cannot be used; one line that says what to do."""
