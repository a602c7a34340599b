"""Train a network: python train.py norm=ln_pn batch=32. `--help` lists the configuration."""

import sys
import traceback

import hydra
from omegaconf import DictConfig, OmegaConf

from proxynorm.cli import as_installed, guard
from proxynorm.errors import ProxynormError
from proxynorm.train.config import CONFIGS, check_arguments, settings_from


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> None:
    guard(lambda: run(config))


def run(config: DictConfig) -> int:
    """Train and return the exit status; after an unexpected exception, print the run folder."""
    from proxynorm.train.distributed import environment_ranks
    from proxynorm.train.nonfinite import NonFiniteError
    from proxynorm.train.run import train
    from proxynorm.train.settings import folder_of

    settings = settings_from(config)
    try:
        return train(settings, OmegaConf.to_container(config, resolve=True))
    except NonFiniteError:
        if environment_ranks().rank != 0:  # every process raises it, and the first one reports it
            sys.exit(1)
        raise
    except ProxynormError:
        raise
    except Exception:
        traceback.print_exc()
        folder = folder_of(settings)
        print(f"error: the run in {folder} ended with the fault above", file=sys.stderr)
        return 1


def entry() -> None:
    """Check the command line, then print the help or train."""
    sys.argv[1:] = words = check_arguments(sys.argv[1:])
    if {"-h", "--help"} & set(words):
        from proxynorm.train.help import help_text

        print(as_installed(help_text([word for word in words if "=" in word])))
    else:
        main()
