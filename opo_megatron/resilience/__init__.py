"""Stop requests and the watchdog: how a run ends early and resumably."""
