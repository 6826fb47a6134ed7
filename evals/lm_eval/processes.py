"""Several processes, started by torchrun or ``accelerate launch``: a model each, the documents split between them."""

import os
from datetime import timedelta

import torch
from accelerate import InitProcessGroupKwargs, PartialState

from headq_ao.evals.lm_eval.arguments import ModelArgumentError

WAIT = timedelta(weeks=52)  # lm-eval's own: a process that is done waits for those that still score


def launched() -> tuple[int, int]:
    """Rank of this process and number of processes, as the launcher says; ``(0, 1)`` without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device: str | None) -> PartialState:
    """Meet the processes that the launcher started, over gloo on CPUs; at once, so that no work is lost if it fails.

    Args:
        device: the model's, as asked for; ``"cpu"`` leaves GPUs alone.

    Raises:
        ModelArgumentError: when the processes are on several machines, or accelerate does not find them all.

    Example:
        >>> from headq_ao.evals.lm_eval.processes import join_processes
        >>> join_processes("cpu").num_processes
        1
    """
    size = launched()[1]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if here != size:
        raise ModelArgumentError(
            f"model=headq splits documents between processes of one machine, got {size} processes with {here} of them "
            "here; start all on one machine"
        )
    cpu = size > 1 and (device == "cpu" or not torch.accelerator.is_available())
    state = PartialState(cpu=cpu, **InitProcessGroupKwargs(timeout=WAIT).to_kwargs())
    if state.num_processes != size:
        raise ModelArgumentError(
            f"all {size} processes of the launcher must take part, accelerate found {state.num_processes} on "
            f"{state.device}; say --device cpu, or start one process"
        )
    state.wait_for_everyone()
    return state


def leave_processes() -> None:
    """Part from the other processes, if there are any."""
    if torch.distributed.is_initialized():
        PartialState().destroy_process_group()
