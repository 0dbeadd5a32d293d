"""What happens around a run under SLURM: tries and requeues, the check of the nodes, staging, submission, state."""
