"""Which of several processes this is, as torchrun and `accelerate launch` say it in the environment."""

import os


def rank() -> int:
    """This process among all of them, on every host: 0 writes the results."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its host: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world() -> int:
    """How many processes work on the stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Go on when every process has come here. One process goes on at once."""
    if world() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
