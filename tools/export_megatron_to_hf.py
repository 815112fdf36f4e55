"""`opo export`, as a script: a Hugging Face folder of a Megatron checkpoint."""

import sys

from opo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
