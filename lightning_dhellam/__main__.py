"""`python -m lightning_dhellam` is the `dhellam` command."""

import sys

from lightning_dhellam.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
