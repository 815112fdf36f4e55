"""`opo export` as a script: Megatron checkpoint → Hugging Face folder."""

import sys

from opo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
