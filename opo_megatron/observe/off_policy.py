"""How a run that is off-policy on purpose is called, wherever it is shown."""

from __future__ import annotations


def off_policy_words(staleness: int, replay: str) -> str:
    """Of `rollout.staleness` and `rollout.replay.method`; empty for neither."""
    if staleness:
        return f"OFF-POLICY ({staleness} step{'s' if staleness > 1 else ''})"
    return f"OFF-POLICY (replay by {replay})" if replay != "off" else ""
