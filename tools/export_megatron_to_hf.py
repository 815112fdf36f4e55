"""`opo export` as a script: Megatron checkpoint → Hugging Face folder."""

import sys

from opo_megatron.cli.main import main
from opo_megatron.utils.terminal import prepare_terminal

if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main(["export", *sys.argv[1:]]))
