"""Many runs and short windows: suite, ablation, tuning, diagnosis, self-test."""
