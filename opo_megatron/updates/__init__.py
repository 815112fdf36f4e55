"""Steps around a run other than OPO's own: SFT, PPO/GRPO, the variance report, non-finite numbers."""
