"""Strict settings for all tests, and eight CPU devices, so that meshes of 1 to 8 are tested in one process."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import matplotlib

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")
