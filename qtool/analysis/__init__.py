"""The study of a model: what its attention tolerates, and which heads it can do without."""
