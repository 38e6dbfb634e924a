"""Fine-tunes vision-language-action policies on robot data in the LeRobot format.

In come a training YAML and data sets; out go checkpoints, metrics and served or evaluated policies. Start reading at
``run.py``; ``docs/architecture.md`` says what each room is for.
"""
