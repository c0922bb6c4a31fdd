"""Teachers: frozen models that score the completions of the policy."""
