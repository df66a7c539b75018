"""The parts of Evaluate: correctness, contest and latency, model level, and the report."""
