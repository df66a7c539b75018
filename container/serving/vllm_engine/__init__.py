"""vLLM as the engine: its scheduler, workers and parallelism, our compiled kernel as its MLA decode backend.

Nothing here imports vLLM before an engine is loaded: the package is optional (the extra `vllm`).
"""
