"""The benchmark on workloads: baselines with their sources, two rulesets, resumable runs, paired comparisons."""
