"""Examples, importable from the repository root (`examples.tiny.domains`)."""
