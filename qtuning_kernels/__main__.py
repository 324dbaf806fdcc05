"""`python -m qtuning_kernels` and `qtuning`: the command line, which an interrupt ends while libraries load, too."""

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    try:
        from qtuning_kernels.commands import cli

        return cli.main(argv)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("qtuning: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
