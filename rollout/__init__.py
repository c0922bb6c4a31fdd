"""Rollout: sampling completions from the policy with vLLM."""
