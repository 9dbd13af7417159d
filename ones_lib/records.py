"""``python -m ones_lib.records RECORD OTHER``: what differs between two records; see :mod:`ones_lib.study.records`."""

import sys

if __name__ == "__main__":
    from ones_lib.study.records import main

    sys.exit(main())
