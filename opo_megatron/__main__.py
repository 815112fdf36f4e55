"""`python -m opo_megatron` is `opo`, and the console script starts here.

`opo doctor` is answered before any package is imported: it is what is asked where imports fail.
"""

import sys
from typing import NoReturn

from opo_megatron.utils.terminal import prepare_terminal


def entry() -> NoReturn:
    """The console script."""
    prepare_terminal(shows_warnings="--debug" in sys.argv)
    if sys.argv[1:2] == ["doctor"]:
        from opo_megatron.environment.doctor import main as doctor

        sys.exit(doctor(sys.argv[2:]))
    from opo_megatron.cli.main import main

    sys.exit(main())


if __name__ == "__main__":
    entry()
