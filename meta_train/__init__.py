"""Meta-training: learners, gradient estimators, the trainer, the benchmark and the command line."""
