"""Studies of a float model: what its attention tolerates, and which heads it can do without."""
