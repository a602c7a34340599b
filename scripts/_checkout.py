"""Find proxynorm beside this folder, so that a script tells what its Python lacks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proxynorm.commands import run as run
