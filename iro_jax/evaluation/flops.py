"""What reading and sampling cost, in floating-point operations, tokens and queries.

Counted are matrix products, each multiplication and addition as two: the projections of every
layer, the scores and the weighted sums of attention, and what the network ends in. Norms,
activations and the softmax are left out; they are a few percent of a real network. Tokens are real
ones: padding, which depends on batches and buckets, is not billed.

How costs grow (Table 1 of arXiv 2506.17828, of which it gives the highest power): projections
cost the same for every token, so that they are linear in the length H of the answers; attention
reads everything before a token, so that it is quadratic in H. Both are linear in the number of
candidates U = K * B, and value functions also in their number I.

Letters: S tokens of the prompt, H of an answer, L of a chunk, U candidates, D width, P prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from iro_jax.evaluation.ledger import Cost
from iro_jax.models import TransformerConfig
from iro_jax.models.flops import decode_flops, forward_flops


@dataclasses.dataclass(frozen=True)
class Reader:
    """One pass of a network that reads texts to judge them: a value function or reward model.

    Attributes:
      config: of its transformer.
      layers: how many blocks it runs, for heads in the middle; all by default. None of them (0)
        for heads on features that the policy has computed anyway.
      lora_rank: of the adapters on its projections that are not merged; 0 without.
      num_values: scalars that its heads give for each token. T heads on one backbone are one
        reader of T values; T adapters or T networks are T readers.
      logits: whether it reads logits over the vocabulary too, as a log-ratio of models does.
    """

    config: TransformerConfig
    layers: int | None = None
    lora_rank: int = 0
    num_values: int = 1
    logits: bool = False

    def flops(self, new_tokens: ArrayLike, context: ArrayLike = 0) -> float:
        """Of reading texts; see `forward_flops`."""
        new, _ = np.broadcast_arrays(new_tokens, context)
        heads = 2.0 * self.config.embed_dim * self.num_values * float(np.sum(new))
        return heads + forward_flops(
            self.config,
            new,
            context,
            layers=self.layers,
            outputs=new if self.logits else 0,
            lora_rank=self.lora_rank,
        )


def sample_cost(
    policy: TransformerConfig,
    *,
    prompt_tokens: Int[ArrayLike, "*P"],
    lengths: Int[ArrayLike, "*P N"],
) -> Cost:
    """Plain sampling of N answers a prompt, whose prompt is read once.

    Args:
      policy: of the language model.
      prompt_tokens: lengths of the prompts, `[P]` or one number.
      lengths: of the answers, `[P, N]` or `[N]`.
    """
    prompts, lengths = np.asarray(prompt_tokens), np.asarray(lengths)
    return Cost(
        tokens_sampled=int(lengths.sum()),
        tokens_read=int(prompts.sum()),
        policy_flops=forward_flops(policy, prompts, outputs=1)
        + decode_flops(policy, lengths, prompts[..., None]),
    )


def reward_cost(reward: Reader, lengths: Int[ArrayLike, " n"]) -> Cost:
    """Scoring n whole texts, prompt and answer together, of these many tokens.

    A reader without layers finds its hidden states computed.
    """
    lengths = np.asarray(lengths)
    return Cost(
        tokens_read=0 if reward.layers == 0 else int(lengths.sum()),
        reward_queries=lengths.size,
        reward_flops=reward.flops(lengths),
    )


def search_cost(
    policy: TransformerConfig,
    values: Sequence[Reader],
    *,
    prompt_tokens: int,
    beam_width: int,
    num_successors: int,
    chunk_length: int,
    max_new_tokens: int,
    reread: bool = False,
) -> Cost:
    """What a guided search for one prompt costs at most: no candidate ends before H.

    With I readers of one value each, U = K * B: U * H tokens, U * ceil(H / L) * I value queries.
    The arguments are those of `iro_jax.search.search` and of `trace_cost`.
    """
    starts = np.arange(0, max_new_tokens, chunk_length)
    chunks = np.minimum(chunk_length, max_new_tokens - starts)
    candidates = beam_width * num_successors
    return trace_cost(
        policy,
        values,
        prompt_tokens=[prompt_tokens],
        chunk_lengths=np.tile(chunks[:, None, None], (1, 1, candidates)),
        chunk_length=chunk_length,
        reread=reread,
    )


def trace_cost(
    policy: TransformerConfig,
    values: Sequence[Reader],
    *,
    prompt_tokens: Int[ArrayLike, " P"],
    chunk_lengths: Int[ArrayLike, "steps P *candidates"],
    chunk_length: int,
    reread: bool = False,
) -> Cost:
    """What a guided search has cost, from the chunks that it sampled.

    Every prompt is read once by the policy and by each reader, every chunk once by each reader.

    Args:
      policy: of the language model.
      values: passes that score each candidate; none for a search without a score.
      prompt_tokens: lengths of the prompts. Readers with a tokenizer of their own are billed as
        if they had the policy's.
      chunk_lengths: tokens sampled for each candidate, 0 for those carried or empty; a search's
        `trace.chunk_lengths`.
      chunk_length: L. Only an answer's last chunk is shorter, so that the chunks of step k start
        after k * L tokens.
      reread: bills readers without a cache of their own, as Table 1 does: they read the prompt
        and the whole answer so far for every candidate. Reading no prefix twice is what this
        library's do.
    """
    prompts, chunks = np.asarray(prompt_tokens), np.asarray(chunk_lengths)
    chunks = chunks.reshape(*chunks.shape[:2], -1)
    before = chunk_length * np.arange(len(chunks))[:, None, None]
    context = np.broadcast_to(prompts[:, None] + before, chunks.shape)
    new = chunks > 0
    sampled, starts = chunks[new], context[new]

    value_flops, value_tokens = 0.0, 0
    for reader in values:
        if reread:
            value_flops += reader.flops(sampled + starts)
            tokens = int(np.sum(sampled + starts))
        else:
            value_flops += reader.flops(prompts) + reader.flops(sampled, starts)
            tokens = int(prompts.sum() + sampled.sum())
        value_tokens += 0 if reader.layers == 0 else tokens
    return Cost(
        tokens_sampled=int(sampled.sum()),
        tokens_read=int(prompts.sum()) + value_tokens,
        value_queries=sampled.size * sum(reader.num_values for reader in values),
        policy_flops=forward_flops(policy, prompts, outputs=1)
        + decode_flops(policy, sampled, starts),
        value_flops=value_flops,
    )
