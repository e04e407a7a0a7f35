"""pFedGPA: diffusion-based generative parameter aggregation (arXiv 2409.05701), without Flower."""

import sys

if sys.platform == "win32":
    raise ImportError(
        "pFedGPA locks and syncs its files as POSIX systems do, and Windows does not; right would "
        "be the Windows Subsystem for Linux (WSL 2), Linux or macOS"
    )
