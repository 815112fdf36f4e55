"""The mathematics: advantages, objectives, on-policy checks.  Torch only; no Megatron, no I/O."""
