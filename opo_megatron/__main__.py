"""`python -m opo_megatron` is `opo`."""

from opo_megatron.cli import entry

if __name__ == "__main__":
    entry()
