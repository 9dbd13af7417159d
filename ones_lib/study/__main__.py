"""``python -m ones_lib.study``: the command behind ``run_all.sh``."""

import sys

if __name__ == "__main__":
    try:
        from ones_lib.study.command import main
    except KeyboardInterrupt:  # the imports take seconds
        sys.exit(130)
    sys.exit(main())
