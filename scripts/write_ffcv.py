"""Write images to a .beton file: `proxynorm write-ffcv`, proxynorm/commands/write_ffcv.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where it is not installed

from proxynorm.commands import run

if __name__ == "__main__":
    run("write-ffcv")
