"""Guided search as it is published: PyTorch and transformers, one prompt at a time.

The policy keeps a cache, which follows the selected beams; every value function reads every
candidate from the prompt's first token on, chunk after chunk. Value functions are networks of their
own, as the published ones are. Only speed is looked at: heads are random, no answer ends early.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from iro_jax.models import Pretrained, save_pretrained


class Peer:
    """A policy and its value functions in PyTorch.

    Args:
      policy: whose weights are taken.
      num_values: value functions, each with the policy's network and a linear head.
      dtype: of the weights.
      device: such as `cpu` or `cuda`.
    """

    def __init__(
        self,
        policy: Pretrained,
        num_values: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ):
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(policy, Path(folder) / "policy")
            self.policy = transformers.AutoModelForCausalLM.from_pretrained(
                Path(folder) / "policy", dtype=dtype
            ).to(device)
        self.policy.eval()
        width = self.policy.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        self.heads = [
            torch.randn(width, generator=generator).to(device, dtype) for _ in range(num_values)
        ]

    @torch.inference_mode()
    def search(
        self,
        prompt: Sequence[int],
        *,
        beam_width: int = 4,
        num_successors: int = 4,
        chunk_length: int = 16,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        top_k: int = 50,
    ) -> list[int]:
        """The answer of the highest value."""
        size = beam_width * num_successors
        device = self.policy.device
        tokens = torch.tensor([list(prompt)] * size, device=device)
        cache = transformers.DynamicCache(config=self.policy.config)
        output = self.policy(tokens[:1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(size)
        logits = output.logits[:, -1].repeat(size, 1)
        scores = torch.zeros(size, device=device)
        for start in range(0, max_new_tokens, chunk_length):
            if start:
                kept = torch.topk(scores, beam_width).indices.repeat_interleave(num_successors)
                tokens, logits = tokens[kept], logits[kept]
                cache.batch_select_indices(kept)
            for _ in range(chunk_length):
                best, ids = torch.topk(logits.float() / temperature, top_k)
                drawn = torch.multinomial(torch.softmax(best, dim=-1), 1)
                tokens = torch.cat([tokens, ids.gather(1, drawn)], dim=1)
                output = self.policy(tokens[:, -1:], past_key_values=cache, use_cache=True)
                logits = output.logits[:, -1]
            scores = sum(
                (self._values(tokens, head) for head in self.heads), torch.zeros_like(scores)
            )
        return tokens[int(scores.argmax()), len(prompt) :].tolist()

    def _values(self, tokens: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """One value function reads whole sequences."""
        states = self.policy.model(tokens, use_cache=False).last_hidden_state
        return (states[:, -1] @ head).float()

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_samples: int = 1
    ) -> torch.Tensor:
        """Plain sampling by `transformers`, of prompts of one length, so many answers to each."""
        tokens = torch.tensor([list(prompt) for prompt in prompts], device=self.policy.device)
        return self.policy.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            num_return_sequences=num_samples,
            temperature=0.7,
            top_k=50,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
