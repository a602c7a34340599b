"""Check the installation: `proxynorm doctor`, proxynorm/commands/doctor.py."""

from proxynorm.commands import run

if __name__ == "__main__":
    run("doctor")
