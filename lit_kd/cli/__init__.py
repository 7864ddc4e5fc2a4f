"""The command line: ``lit-kd fit``, ``test``, ``compare``, ``inspect``, ``export``, ``predict``."""
