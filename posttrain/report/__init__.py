"""What a run shows when it is done: summary.json, the table, the picture, and sampled rollouts."""
