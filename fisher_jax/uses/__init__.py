"""What people do with Fisher information: pruning, decisions, shifts, merging, continual learning."""
