"""The command line: every command parses, calls one method, and prints. It owns no logic."""

from .main import main

__all__ = ["main"]
