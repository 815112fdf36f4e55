"""The policy: a Megatron-Core GPT, its schedules, its optimizer and the one training step."""
