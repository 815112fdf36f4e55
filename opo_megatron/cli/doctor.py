"""`opo doctor`: its command line; the checks are in `environment/doctor.py`."""

from opo_megatron.environment.doctor import add_arguments, run

SUMMARY = "what is installed, what each missing part costs, and how to install it"
EPILOG = """\
examples:
  opo doctor --need gpu --need sglang
      exit code 2 if one of these parts is missing or wrong
"""

__all__ = ["EPILOG", "SUMMARY", "add_arguments", "run"]
