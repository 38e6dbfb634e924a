"""From a YAML file and the command line to a config that has been checked, and to the plan of its batches.

In come paths and overrides; out go filled dataclasses, or an error that names the file, the key and what to write instead.
Start reading at ``strict.py``. The dataclass itself is ``agent.configuration_pipeline.TrainPipelineConfig``.
"""
