"""The model server: an engine for multi-head latent attention models behind SageMaker's contract."""
