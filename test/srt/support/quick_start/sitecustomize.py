"""The servers of tests start quicker: Python imports this module at its start, from PYTHONPATH.

Two thirds of a start are imports, in each of a server's three processes. They make millions of objects, none of which
the garbage collector could free, and it would look through all of them again and again.
"""

import gc

gc.set_threshold(100_000, 50, 100)
