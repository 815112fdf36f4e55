"""The policy: a Megatron-Core GPT, its schedules, its optimizer and the one training step."""

import logging
import warnings

# Megatron says at import which GPU packages it does without, and uses names that torch renamed.
# Both are known here and neither is the user's to mend.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
# It also has torch look for a CUDA compiler, and a CUDA build that finds one but no GPU warns of that.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
)
