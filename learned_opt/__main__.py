"""``python -m learned_opt`` is the command ``learned-opt``, of the package ``meta_train`` that comes with this one."""

import runpy

runpy.run_module("meta_train.cli", run_name="__main__", alter_sys=True)
