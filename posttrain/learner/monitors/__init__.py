"""Health signals of training."""
