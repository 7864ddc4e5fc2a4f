"""The command line: ``lit-kd fit``, ``test``, ``compare``, ``inspect``, ``trust``, ``export``, ``predict``."""
