"""``python -m ones_lib.records``: lists records, or compares two of them; see :mod:`ones_lib.study.listing`."""

import sys

if __name__ == "__main__":
    from ones_lib.study.listing import main

    sys.exit(main())
