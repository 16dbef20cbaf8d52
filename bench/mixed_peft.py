"""PEFT's way to mix adapters in a batch: ``adapter_names``, on the same layers in PyTorch."""

from __future__ import annotations

import numpy as np
from llama_export import Llama
from measure import Way


def peft_way(sizes: Llama, x: np.ndarray, names: list[str], *, rank: int, threads: int) -> Way:
    """One forward pass over ``x`` ``[n, t, d]`` with one adapter name a row, float32, ``threads`` threads."""
    import peft
    import torch

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for module, shape in sizes.shapes().items():
                if module.startswith("self_attn."):
                    self.add_module(module.partition(".")[2], torch.nn.Linear(*shape, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = sizes.d // sizes.kv // 2
            spread = torch.cat([self.k_proj(x)] * half + [self.v_proj(x)] * half, dim=-1)
            return self.o_proj(self.q_proj(x) * torch.sigmoid(spread))

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()
            self.first, self.second = (torch.nn.Parameter(torch.ones(sizes.d)) for _ in range(2))
            for module, shape in sizes.shapes().items():
                if module.startswith("mlp."):
                    self.add_module(module.partition(".")[2], torch.nn.Linear(*shape, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.self_attn(x * self.first)
            normal = x * self.second
            return x + self.down_proj(torch.sigmoid(self.gate_proj(normal)) * self.up_proj(normal))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(sizes.layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    targets = [module.rpartition(".")[2] for module in sizes.shapes()]
    config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    distinct = list(dict.fromkeys(names))
    model = peft.get_peft_model(Model(), config, adapter_name=distinct[0])
    for name in distinct[1:]:
        model.add_adapter(name, config)
    model.eval()
    rows = torch.from_numpy(x)

    def run() -> object:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return model(rows, adapter_names=names)

    return run
