"""`python -m embedding_relay` is the `sglang-relay` command."""

import sys

from embedding_relay.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
