"""The small checkpoint: what trains it and what measures it."""
