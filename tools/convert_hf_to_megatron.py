"""`opo convert` as a script: Hugging Face folder → Megatron checkpoint."""

import sys

from opo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
