"""From a configuration to a run, and the wording of its errors."""
