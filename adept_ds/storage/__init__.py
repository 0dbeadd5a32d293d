"""What a run leaves on the disk: its folder, metrics, checkpoints, and the folders of its results."""
