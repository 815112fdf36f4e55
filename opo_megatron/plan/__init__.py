"""`opo plan`: memory, communication and time of a run, before a GPU-hour is spent.

The code that trains builds every rank of the layout, one after the other in this process: a fake process
group provides its coordinates, and its tensors are on the meta device, which has shapes and no values.  So
the plan counts what will run.  Only two things are modelled: times (`times.py`, from operations and
bandwidths), and the engine's memory (`engine.py`), which SGLang allocates.
"""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
