"""Prepares the server that data workers are forked from, which imports this module and the decoders that the data need.

The training process has threads and perhaps a CUDA context, which a fork would copy half dead. A fork server is a
fresh process without either; with the heavy imports done there once, a worker starts in milliseconds and shares
their memory. Importing this module is what prepares the server; in the training process nobody imports it.
"""

import faulthandler
import gc
import signal

import torch

import agent.data.samples.reader  # noqa: F401
from agent.data.orphans import end_with_parent


def settle() -> None:
    """Comes first in a new worker."""
    ignore_cluster_signals()
    end_with_parent()
    faulthandler.enable()  # a decoder that crashes says where
    torch.set_num_threads(1)  # there are as many workers as cores already
    gc.freeze()  # looking for garbage among what the server imported would copy its memory into every worker


def ignore_cluster_signals() -> None:
    """Lets this process live through the signals that a cluster sends to every process of a job.

    The trainer answers them, and still needs samples until its update is done. Workers and server end when the
    trainer closes them or is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


ignore_cluster_signals()
