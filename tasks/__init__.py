"""What learned optimizers are trained and judged on: real data, tasks, families of tasks, named suites."""

from .base import Task, TaskFamily

__all__ = ["Task", "TaskFamily"]
