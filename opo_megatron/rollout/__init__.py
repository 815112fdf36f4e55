"""Rollouts: requests, rewards, and the engines that generate responses."""
