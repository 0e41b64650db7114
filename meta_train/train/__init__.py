"""Meta-training: the configuration, inner processes, estimators of the meta-gradient, the trainer and its loop."""
