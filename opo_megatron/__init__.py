"""OPO (On-Policy RL with Optimal reward baseline, arXiv 2505.23585) on a Megatron-Core policy.

Start at `train.py`: the loop fits on one screen and reads like the paper.
"""

__version__ = "0.1.0"
