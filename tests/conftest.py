"""Set before any test imports torch or triton."""

import os
import shutil

if not shutil.which("nvidia-smi"):
    # Triton reads it once, when its own library is imported: kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
