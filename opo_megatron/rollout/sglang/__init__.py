"""Rollouts from SGLang servers: processes in an environment of their own, spoken to over HTTP."""
