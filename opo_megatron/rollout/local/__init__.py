"""The local engine: a decoder in the trainer's own process that knows nothing of Megatron.

It is fed by the Hugging Face-named weight stream, so its agreement with the policy tests the weight
mapping at every step, under every parallel layout.
"""
