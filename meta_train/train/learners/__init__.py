"""Inner learning processes as functions of theta, one a file: what an estimator unrolls."""

from learned_opt.rules.scheduler import SCHEDULES

from .base import ENDLESS, MEASURES, Learner, LearnerState
from .task import task_learner

__all__ = ["ENDLESS", "MEASURES", "SCHEDULES", "Learner", "LearnerState", "task_learner"]
