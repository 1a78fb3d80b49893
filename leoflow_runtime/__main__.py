"""``python -m leoflow_runtime module:callable``."""

import sys

from leoflow_runtime.runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
