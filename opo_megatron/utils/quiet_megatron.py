"""Imported before Megatron-Core: silences what it warns of at import, which no user can fix."""

import logging
import warnings

# At import Megatron names the GPU packages that are missing, and uses names that torch has renamed.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
# It also has torch look for a CUDA compiler; a CUDA build that finds one but no GPU warns of that.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
)
