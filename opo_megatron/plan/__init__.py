"""`opo plan`: what a run will hold, move and take, before a GPU-hour is spent.

Every rank of the layout is built by the project's own code, one after the other in this process: a fake
process group gives it its coordinates, and its tensors are on the meta device, which knows shapes and
no values.  What is counted is thereby what will run.  Only two things are models, and say so: times
(`times.py`, from operations and bandwidths), and the engine's memory (`engine.py`), which is SGLang's.
"""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
