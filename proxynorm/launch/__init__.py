"""Launchers, which train many runs on this machine or on a SLURM cluster."""
