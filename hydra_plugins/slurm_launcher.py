"""hydra/launcher=slurm: python train.py -m norm=bn,ln_pn batch=32,256 hydra/launcher=slurm submits the sweep as one array.

Hydra finds this file by its folder's name, as it does every plugin, and runs it whenever train.py starts: what needs time is
imported when it launches. Hydra runs it before it is in sys.modules, where dataclasses look up annotations that are text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


@dataclass
class SlurmLauncherConfig:
    """hydra.launcher.KEY=…; the keys are those of scripts/reproduce.py launch."""

    _target_: str = "hydra_plugins.slurm_launcher.SlurmLauncher"
    time: str | None = None
    partition: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    cpus_per_task: int | None = None
    limit: int | None = None
    stage: str | None = None
    sbatch: list[str] = field(default_factory=list)
    requeues: int = 0
    probe: bool = False
    dry_run: bool = False
    retry_failed: bool = False
    force: bool = False


class SlurmLauncher(Launcher):
    """Submits what of the sweep is neither finished nor queued; it does not wait for it."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig"
    ) -> None:
        """Note what Hydra is about to create, which dry_run takes away: each job is train.py's command line, and needs none."""
        folder = Path(config.hydra.sweep.dir)
        self.fresh = [
            path
            for path in (folder / "multirun.yaml", folder, *folder.parents)
            if not path.exists()
        ]

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> "list[JobReturn]":
        from proxynorm.launch.multirun import launch

        try:
            launch([list(overrides) for overrides in job_overrides], self.options)
        finally:
            if self.options["dry_run"]:
                for path in self.fresh:
                    path.rmdir() if path.is_dir() else path.unlink()
        return []


ConfigStore.instance().store(
    group="hydra/launcher", name="slurm", node=SlurmLauncherConfig, provider="proxynorm"
)
