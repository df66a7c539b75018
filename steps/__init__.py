"""What runs inside the processing image: one module a pipeline step, `python -m steps.NAME`."""
