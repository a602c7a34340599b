"""Write images to a .beton file: `proxynorm write-ffcv`, proxynorm/commands/write_ffcv.py."""

from _checkout import run

if __name__ == "__main__":
    run("write-ffcv")
