"""The command line: ``lit-kd fit``, ``test``, ``compare``, ``audit``, ``trust``, ``export``, ``predict``."""
