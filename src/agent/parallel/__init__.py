"""Several processes as one training: who takes part, how the policy is split among them, what is recomputed and compiled.

In come the launcher's environment variables and a policy; out go ``Processes``, whose answers are the same on all of them,
and the policy wrapped for DDP or split for FSDP. Start reading at ``launch.py`` and ``processes.py``, then ``wrap.py``.
"""
