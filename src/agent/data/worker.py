"""What the server that data workers are forked from imports: this module, nothing else of the program.

The training process has threads and perhaps a CUDA context, which a fork would copy half dead. A fork server is a
fresh process without either; with the heavy imports done there once, a worker starts in milliseconds and shares
their memory. Importing this module is what prepares the server, so nobody else imports it.
"""

import signal

import lerobot.datasets.lerobot_dataset
import torch.utils.data  # noqa: F401

# A cluster sends its signal to every process of a job. The trainer answers it and still needs samples until its
# update is done; workers and server end when the trainer closes them or is gone.
for _signal in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_signal, signal.SIG_IGN)
