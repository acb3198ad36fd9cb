"""Studies of a float model: what its attention tolerates, shown as JSON and as one page."""
