"""vLLM's load format `mla-random`: the native benchmark's random weights inside vLLM. Only vLLM imports this.

vLLM's own `dummy` weights lie within 0.001 of zero, the norms' too, and tensors of one size are equal: layers
add next to nothing to a token's embedding, and every layer has the same router. With these both engines draw
from one distribution, so that their tokens spread over the experts alike.
"""

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

LOAD_FORMAT = "mla-random"


@register_model_loader(LOAD_FORMAT)
class RandomLoader(BaseModelLoader):
    """Ones for norms, normal values of variance 1 / fan-in for matrices; for one GPU."""

    def download_model(self, model_config: ModelConfig) -> None:
        """There is nothing to download."""

    @torch.no_grad()
    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(std=weight.shape[-1] ** -0.5)


class WorkerExtension:
    """As vLLM's worker_extension_cls it makes the worker import this module before it loads weights."""
