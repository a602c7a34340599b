"""Find the package in this checkout even if it is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proxynorm.commands import run as run
