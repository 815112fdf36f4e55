"""The mathematics: advantages, objectives, on-policy measures.  Torch only; no Megatron, no I/O."""
