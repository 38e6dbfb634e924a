"""Policies in simulation: Meta-World through LeRobot's environment classes, in closed loop. Needs the extra ``sim``."""
