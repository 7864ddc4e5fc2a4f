"""The command line: ``lit-kd fit``, ``test``, ``compare``, ``inspect``, ``export``, ``predict``."""

from lit_kd.cli.main import main

__all__ = ["main"]
