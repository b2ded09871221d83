"""What surrounds a run on a cluster: checks before it starts."""
