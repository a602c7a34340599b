"""How many runs get trained: on this machine, on SLURM."""
