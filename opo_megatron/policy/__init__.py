"""The policy: a Megatron-Core GPT, its schedules, its optimizer and the one training step."""

import warnings

# Megatron says at import which GPU packages it does without, and uses names that torch renamed.
# Both are known here and neither is the user's to mend.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
