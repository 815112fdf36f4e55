"""The local engine: a decoder in the trainer's process, independent of Megatron.

It loads the weight stream by Hugging Face names, so its agreement with the policy tests the parameter
mapping at every step, under every parallel layout.
"""
