"""The second network."""

from __future__ import annotations


class Critic:
    """x"""

    def __init__(self, *a) -> None: ...
