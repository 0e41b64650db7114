"""What learned optimizers are trained and judged on: real data, tasks, families of tasks, named suites."""

from .base import Task, TaskFamily, Workload, num_params

__all__ = ["Task", "TaskFamily", "Workload", "num_params"]
