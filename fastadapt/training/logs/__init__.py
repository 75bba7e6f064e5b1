"""The records of a run, its sinks, and a step's metrics."""
