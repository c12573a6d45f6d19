"""Questions to a model: its answers, their scores, and the benchmarks of lmms-eval."""
