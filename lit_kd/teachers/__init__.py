"""Frozen teachers: modules, how they run, and a cache of their outputs."""
