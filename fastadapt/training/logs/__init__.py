"""The records of a run, the sinks that receive them, and the metrics of a step."""
