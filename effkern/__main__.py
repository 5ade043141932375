"""``python -m effkern``: the command line without its entry point."""

import sys

from effkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
