"""Post-training for mixture-of-experts models: SFT, RL teachers, multi-teacher on-policy distillation."""
