"""Families of tasks, one kind a file, and the networks that they share."""
