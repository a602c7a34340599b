# Sourced by every job, on its first node, before it trains. Edit it for your cluster; `root` is this repository.

# source /etc/profile                               # if jobs lack the `module` command
# module load cuda/12.4 python/3.11
# export NCCL_SOCKET_IFNAME=ib0                     # if the nodes' host names lead to the wrong network
# export PROXYNORM_CACHE=/a/folder/all/nodes/see

if [ -f "$root/.venv/bin/activate" ]; then
    source "$root/.venv/bin/activate"
fi

# An array: the command that runs Python with proxynorm's requirements, with anything that goes before it.
python=(python)

# In a container, which needs access to the repository, the folders of runs and of data, and STAGE:
# python=(apptainer exec --nv --bind "$root,/a/folder/of/data,/dev/shm" image.sif python)
