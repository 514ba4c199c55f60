"""The application: the command line, the studies, and what they print. The mathematics is in hessian_tools and ikun."""

import os
import sys

# Without this, MKL on some processors (AMD with AVX-512, for one) gives other bits for other alignments of its arrays,
# and a resumed analysis would not end with the same bits. MKL reads the variable once, so it is set before torch loads.
if "torch" not in sys.modules:
    os.environ.setdefault("MKL_CBWR", "AUTO")
