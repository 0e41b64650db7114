"""What several test files share. No test imports a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
