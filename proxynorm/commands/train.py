"""Train a network: python train.py norm=ln_pn batch=32. `--help` lists the configuration."""

import sys
import traceback

import hydra
from omegaconf import DictConfig, OmegaConf

from proxynorm.cli import as_installed, fail, guard
from proxynorm.errors import ProxynormError
from proxynorm.train.config import CONFIGS, check_arguments, settings_from


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> None:
    from proxynorm.train.distributed import PeerError, environment_ranks
    from proxynorm.train.nonfinite import NonFiniteError
    from proxynorm.train.run import train
    from proxynorm.train.settings import folder_of

    settings = settings_from(config)
    try:
        status = train(settings, OmegaConf.to_container(config, resolve=True))
    except (NonFiniteError, PeerError) as error:
        # Every process raises NonFiniteError: the first one reports it.
        if isinstance(error, PeerError) or environment_ranks()[0] == 0:
            sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except ProxynormError as error:
        fail(error)
    except Exception:
        traceback.print_exc()
        print(
            f"error: the run in {folder_of(settings)} ended with the fault above", file=sys.stderr
        )
        sys.exit(1)
    if status:
        sys.exit(status)


def entry() -> None:
    try:
        sys.argv[1:] = words = check_arguments(sys.argv[1:])
        if {"-h", "--help"} & set(words):
            from proxynorm.train.help import help_text

            guard(lambda: print(as_installed(help_text([word for word in words if "=" in word]))))
    except ProxynormError as error:
        fail(error)
    main()
