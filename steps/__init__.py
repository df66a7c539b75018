"""What runs inside the processing image: one module a pipeline step, `python -m steps.NAME`."""

import os

# Before torch is imported: OpenMP's threads otherwise spin at every barrier, which on shared cores costs far
# more than it saves (a decode step of the demo model took 268 ms instead of 4).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
