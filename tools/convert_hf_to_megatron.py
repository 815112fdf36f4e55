"""`opo convert` as a script: Hugging Face folder → Megatron checkpoint."""

import sys

from opo_megatron.cli.main import main
from opo_megatron.utils.terminal import prepare_terminal

if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main(["convert", *sys.argv[1:]]))
