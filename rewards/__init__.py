"""Rewards and the verifiers behind them."""
