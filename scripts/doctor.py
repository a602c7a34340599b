"""Check the installation: `proxynorm doctor`, proxynorm/commands/doctor.py."""

from _checkout import run

if __name__ == "__main__":
    run("doctor")
