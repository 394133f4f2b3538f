"""Guided search as it is published: PyTorch and transformers, one prompt at a time.

The loop is that of the chunk-level beam search which the authors' release builds on (its decoder
is `cbs.py` of github.com/ZHZisZZ/weak-to-strong-search): a prompt is repeated for all candidates
and read; at every token the warpers of `transformers` and a draw go over the whole vocabulary; at
the end of a chunk the cache follows the selected beams, and every value function reads every
candidate from the prompt's first token on. Kinder than that one, it reads only the last token's
logits of a prompt, and hands token ids, not text, to the value functions. These are networks of
their own, as the published ones are. Only speed is looked at: heads are random, no answer ends
early.
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
        tokens = torch.tensor([list(prompt)] * (beam_width * num_successors))
        tokens = unread = tokens.to(self.policy.device)
        warpers = transformers.LogitsProcessorList(
            [
                transformers.TemperatureLogitsWarper(temperature),
                transformers.TopKLogitsWarper(top_k),
            ]
        )
        cache = transformers.DynamicCache(config=self.policy.config)
        for drawn in range(1, max_new_tokens + 1):
            output = self.policy(unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
            warped = warpers(tokens, output.logits[:, -1].float())
            unread = torch.multinomial(torch.softmax(warped, dim=-1), 1)
            tokens = torch.cat([tokens, unread], dim=1)
            if drawn % chunk_length and drawn < max_new_tokens:
                continue
            scores = sum(
                (self._values(tokens, head) for head in self.heads), torch.zeros(len(tokens))
            )
            kept = torch.topk(scores, beam_width).indices.repeat_interleave(num_successors)
            kept = kept.to(tokens.device)
            tokens, unread = tokens[kept], unread[kept]
            cache.batch_select_indices(kept)
        return tokens[0, len(prompt) :].tolist()

    def _values(self, tokens: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """One value function reads whole sequences."""
        states = self.policy.model(tokens, use_cache=False).last_hidden_state
        return (states[:, -1] @ head).float().cpu()

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
