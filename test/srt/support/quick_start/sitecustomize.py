"""The servers of tests start in three quarters of the time: Python imports this module at its start, from PYTHONPATH.

Two thirds of a start are imports, in each of a server's three processes. They make millions of objects, none of which
the garbage collector could free, and it would look through all of them again and again. And SGLang imports flashinfer
where it is installed: two seconds of kernels that need a GPU, while SGLang's own packages for a CPU come without it.
"""

import gc
import sys

gc.set_threshold(100_000, 50, 100)
sys.modules["flashinfer"] = None  # what makes `import flashinfer` an ImportError
