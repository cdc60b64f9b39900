"""`python -m benchmarks.gpu`. The other benchmarks are scripts that import each other by bare names; so do these."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
