"""``python -m ones_lib.study``: the command behind ``run_all.sh``."""

import sys

from ones_lib.study.command import main

if __name__ == "__main__":
    sys.exit(main())
