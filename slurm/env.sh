# Sourced by every job, on its first node, before it trains. Edit it for your cluster; `root` is this repository.
# `python` is an array: the command, and what goes before it, that runs Python with proxynorm's requirements.

# module load cuda/12.4 python/3.11
# export NCCL_SOCKET_IFNAME=ib0                     # where the nodes' host names lead to the wrong network
# export PROXYNORM_CACHE=/a/folder/all/nodes/see

# in a container:
# python=(apptainer exec --nv --bind "$root" image.sif python)

python=(python)
if [ -f "$root/.venv/bin/activate" ]; then
    source "$root/.venv/bin/activate"
fi
