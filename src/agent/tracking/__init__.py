"""What a run reports while it trains: ``metrics.jsonl`` always, wandb beside it when asked for, lines and a bar in the log.

In comes a record of numbers per logged update; nothing comes back, and nothing in here ends or delays a training. Start
reading at ``metrics.py``.
"""
