"""`opo convert`, as a script: a Megatron checkpoint of a Hugging Face folder."""

import sys

from opo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
