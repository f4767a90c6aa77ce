"""What is measured: model shapes, and a model with an inner loop as one setting.

Everything is drawn from seeds, so that each contender, in whatever process, gets the same weights and the same
tokens. Random tokens do: the cost of a meta-gradient does not depend on what is learned.
"""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mamlfast import Episode

# A wider initialisation than Hugging Face's 0.02 gives attention something to do, and with it to its gradients.
INITIALIZER_RANGE = 0.05


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with untied embeddings."""

    name: str
    layers: int
    width: int
    ffn: int
    heads: int
    vocabulary: int

    @property
    def block_weights(self) -> int:
        """Entries of the linear layers inside the decoder blocks."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.ffn)

    @property
    def head_weights(self) -> int:
        """Entries of the output projection."""
        return self.width * self.vocabulary

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters: linear layers, the embedding, and the weights of the norms."""
        return self.block_weights + 2 * self.head_weights + (2 * self.layers + 1) * self.width

    def model(self, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
        """Build the model; the caller's random state is left alone."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=False,
            attn_implementation=attention,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).to(dtype)


TINY = Shape(name="llama-tiny", layers=2, width=32, ffn=48, heads=4, vocabulary=64)
LLAMA_5M = Shape(name="llama-5m", layers=4, width=256, ffn=688, heads=4, vocabulary=4096)
LLAMA_30M = Shape(name="llama-30m", layers=8, width=512, ffn=1376, heads=8, vocabulary=4096)
LLAMA_30M_50K = Shape(name="llama-30m-50k", layers=8, width=512, ffn=1376, heads=8, vocabulary=50257)

SHAPES = {shape.name: shape for shape in (TINY, LLAMA_5M, LLAMA_30M, LLAMA_30M_50K)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One meta-gradient: ``steps`` inner SGD steps and a query, each on ``batch`` sequences of ``tokens`` tokens."""

    shape: Shape
    steps: int
    batch: int
    tokens: int
    lr: float = 0.1
    seed: int = 1

    def __post_init__(self):
        if min(self.steps, self.batch) < 1 or self.tokens < 2:
            raise ValueError(f"a setting needs a step, a sequence and two tokens or more; got {self.name}")

    @property
    def name(self) -> str:
        """Shape, inner steps, batch x tokens."""
        return f"{self.shape.name} K={self.steps} {self.batch}x{self.tokens}"

    def episode(self) -> Episode:
        """Random tokens, one support batch a step; every token but the first of a sequence is a label."""
        generator = torch.Generator().manual_seed(self.seed)
        size = self.steps + 1, self.batch, self.tokens
        *support, query = torch.randint(self.shape.vocabulary, size, generator=generator)
        return Episode(support=[_batch(ids) for ids in support], query=_batch(query))


def _batch(ids):
    return {"input_ids": ids, "labels": ids}
