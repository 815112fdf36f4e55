"""Responses drawn from the policy: what they are, and the engines that draw them."""
