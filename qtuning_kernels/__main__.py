"""`python -m qtuning_kernels`: the command line, as torchrun and accelerate launch start it."""

import sys

from qtuning_kernels.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
