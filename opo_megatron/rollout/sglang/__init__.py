"""Rollouts from SGLang servers: processes in their own Python environment, used over HTTP."""
