"""Makes `made_files`, which the tests of folders, lists and archives share, importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
