"""Suppresses Megatron-Core's import warnings, which no user can fix; import it before Megatron-Core."""

import logging
import warnings

# At import Megatron warns of missing GPU packages and uses deprecated names of torch.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
# It also makes torch look for a CUDA compiler; a CUDA build with a compiler but no GPU warns.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
)
