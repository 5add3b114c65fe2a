"""``python -m tokenscope``: hands over to `tokenscope.cli`."""

import sys

from tokenscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
