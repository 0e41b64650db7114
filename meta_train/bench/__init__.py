"""The benchmark: who takes part, how runs are made, timed, kept and measured, and the report of it all."""
