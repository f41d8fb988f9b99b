"""What differs when kernels run under Triton's interpreter on a CPU (TRITON_INTERPRET=1).

The interpreter of Triton 3.6 has no bfloat16 arithmetic, mis-rounds casts to 8-bit floats and knows no inline assembly
(triton-lang/triton#11584). Kernels take a compile-time switch for each of these, and launchers set it from here.
"""

import os

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
