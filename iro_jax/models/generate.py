"""Plain sampling from a policy: the search's caches and sampler without the search.

`generate` works on arrays and is one program from prompt to answers; the caller jits.
`Sampler` works on text: it renders prompts, sorts them into buckets, and compiles once for
each bucket.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm.auto import tqdm

from iro_jax.models.coded import code_weights
from iro_jax.models.network import Network, Params
from iro_jax.models.sampling import Sampling, draw
from iro_jax.models.sharding import where
from iro_jax.models.text import (
    Conversation,
    PromptBatch,
    TextFormat,
    bucket_length,
    check_ids,
    pad_prompts,
    render,
)
from iro_jax.models.weights import Pretrained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Sampled answers. Letters: P prompts, N samples a prompt, H max_new_tokens.

    Attributes:
      tokens: ids with the EOS, zero after it, `[P, N, H]`.
      lengths: number of tokens, EOS included, `[P, N]`.
      finished: whether an EOS ended the answer, rather than H.
      log_probs: of each token under the policy, zero after the end, `[P, N, H]`.
      warped_log_probs: of each token under the distribution it was drawn from.
    """

    tokens: Int[Array, "P N H"]
    lengths: Int[Array, "P N"]
    finished: Bool[Array, "P N"]
    log_probs: Float[Array, "P N H"]
    warped_log_probs: Float[Array, "P N H"]


def prompt_keys(seed: int, prompt_ids: Sequence[str]) -> Key[Array, " P"]:
    """One key for each prompt, from the run's seed and the prompt's id alone."""
    root = jax.random.key(seed, impl="threefry2x32")
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in prompt_ids]
    words = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)
    fold = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1]))
    return fold(words)


def draw_keys(
    keys: Key[Array, " P"], step: int | Int[Array, "*P"], samples: int
) -> Key[Array, "P N"]:
    """The keys of one token's draws: by prompt, step and sample."""

    def of_prompt(key, step):
        key = jax.random.fold_in(key, step)
        return jax.vmap(lambda sample: jax.random.fold_in(key, sample))(jnp.arange(samples))

    return jax.vmap(of_prompt)(keys, jnp.broadcast_to(step, keys.shape))


def generate(
    network: Network,
    params: Params,
    keys: Key[Array, " P"],
    tokens: Int[Array, "P S"],
    mask: Bool[Array, "P S"],
    *,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    max_new_tokens: int,
    num_samples: int = 1,
) -> Answers:
    """Samples answers to a batch of prompts.

    Args:
      network: the policy; static, like everything after `mask`.
      params: its weights.
      keys: one key a prompt; see `prompt_keys`.
      tokens: prompts, padded anywhere.
      mask: which tokens are real.
      sampling: how tokens are drawn.
      eos_ids: tokens that end an answer.
      max_new_tokens: H.
      num_samples: N.
    """
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(
            "max_new_tokens and num_samples must be at least 1."
            f" Got: {max_new_tokens}, {num_samples}"
        )
    chex.assert_equal_shape_prefix([keys, tokens], 1)
    num_prompts, prompt_slots = tokens.shape
    cache = network.empty_cache(
        num_prompts=num_prompts,
        prompt_slots=prompt_slots,
        num_successors=num_samples,
        chunk_length=max_new_tokens,
    )
    outputs, cache = network.prefill(params, cache, tokens, mask)
    assert outputs.logits is not None
    first_logits = jnp.broadcast_to(
        outputs.logits[:, None], (num_prompts, num_samples, outputs.logits.shape[-1])
    )

    def is_eos(token: Array) -> Array:
        return functools.reduce(jnp.logical_or, [token == i for i in eos_ids], token != token)

    def append(answers: Answers, step: Array, logits: Array) -> Answers:
        drawn = draw(draw_keys(keys, step, num_samples), logits, sampling)
        alive = ~answers.finished

        def put(buffer, value):
            value = jnp.where(alive, value, 0).astype(buffer.dtype)
            return lax.dynamic_update_index_in_dim(buffer, value, step, axis=-1)

        return Answers(
            tokens=put(answers.tokens, drawn.tokens),
            lengths=answers.lengths + alive,
            finished=answers.finished | is_eos(drawn.tokens),
            log_probs=put(answers.log_probs, drawn.log_probs),
            warped_log_probs=put(answers.warped_log_probs, drawn.warped_log_probs),
        )

    def extend(state):
        step, answers, cache = state
        previous = lax.dynamic_index_in_dim(answers.tokens, step - 1, axis=-1)
        outputs, cache = network.decode(
            params, cache, previous[:, None], ~answers.finished[:, None, :, None]
        )
        assert outputs.logits is not None
        return step + 1, append(answers, step, outputs.logits[:, 0, :, 0]), cache

    def unfinished(state):
        step, answers, _ = state
        return (step < max_new_tokens) & ~jnp.all(answers.finished)

    shape = (num_prompts, num_samples)
    answers = Answers(
        tokens=jnp.zeros((*shape, max_new_tokens), jnp.int32),
        lengths=jnp.zeros(shape, jnp.int32),
        finished=jnp.zeros(shape, bool),
        log_probs=jnp.zeros((*shape, max_new_tokens), jnp.float32),
        warped_log_probs=jnp.zeros((*shape, max_new_tokens), jnp.float32),
    )
    answers = append(answers, jnp.int32(0), first_logits)
    _, answers, _ = lax.while_loop(unfinished, extend, (jnp.int32(1), answers, cache))
    return answers


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer as text.

    Attributes:
      text: the answer without special tokens.
      tokens: its ids, EOS included.
      finished: whether an EOS ended it.
      log_prob: under the policy, summed over tokens, in nats.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    log_prob: float


@dataclasses.dataclass(frozen=True)
class KeyedBatch:
    """Prompts of one bucket, ready for a compiled program.

    Attributes:
      indices: which prompts these are; further rows of the arrays are filled up.
      prompts: what each of them is for each of its readers.
      keys: of the rows.
    """

    indices: tuple[int, ...]
    prompts: tuple[PromptBatch, ...]
    keys: Key[Array, " P"]


def name_prompts(prompts: Sequence[object], prompt_ids: Sequence[str] | None) -> list[str]:
    """The names that draws depend on; by default the prompts' indices.

    Raises:
      ValueError: there are no prompts or one text instead of a list, or the numbers differ.
    """
    if isinstance(prompts, str):
        raise ValueError("Expected a list of prompts. Got: one text")
    names = [str(name) for name in (range(len(prompts)) if prompt_ids is None else prompt_ids)]
    if len(names) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts have {len(names)} prompt_ids")
    return names


def batch_prompts(
    rendered: Sequence[tuple[Int[np.ndarray, " length"], ...]],
    names: Sequence[str],
    *,
    seed: int,
    batch_size: int,
) -> Iterator[KeyedBatch]:
    """Batches of `batch_size` rows, each in the bucket of its longest prompt.

    Prompts of one bucket stay together, but no batch is left incomplete for that, save the last:
    to read a short prompt in a longer bucket costs less than another batch.

    Args:
      rendered: each prompt's tokens, once for each network that reads it its own way.
      names: of the prompts.
      seed: of the keys.
    """
    buckets = [tuple(bucket_length(len(ids)) for ids in readings) for readings in rendered]
    # The longest first, so that the incomplete batch is one of short prompts.
    order = sorted(range(len(rendered)), key=lambda i: buckets[i], reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        lengths = map(max, zip(*(buckets[i] for i in batch), strict=True))
        padded = tuple(
            pad_prompts([rendered[i][reader] for i in batch], length=length, rows=batch_size)
            for reader, length in enumerate(lengths)
        )
        fill = [""] * (batch_size - len(batch))
        keys = prompt_keys(seed, [names[i] for i in batch] + fill)
        yield KeyedBatch(tuple(batch), padded, keys)


def bucket_groups(
    rendered: Sequence[tuple[Int[np.ndarray, " length"], ...]], smallest: int
) -> Iterator[list[int]]:
    """The indices of prompts that are read in one bucket, the longest ones first.

    A group of fewer than `smallest` joins the one before it.
    """
    buckets = [bucket_length(len(readings[0])) for readings in rendered]
    group: list[int] = []
    order = sorted(range(len(rendered)), key=lambda i: buckets[i], reverse=True)
    for _, members in itertools.groupby(order, key=lambda i: buckets[i]):
        fresh = list(members)
        if group and len(fresh) >= smallest:
            yield group
            group = []
        group += fresh
    if group:
        yield group


class Sampler:
    """Answers text with text.

    Args:
      model: the policy with its tokenizer.
      sampling: how tokens are drawn.
      max_new_tokens: longest answer, in tokens.
      batch_size: prompts a program call; incomplete batches are filled up.
      text_format: how prompts are rendered. Its `max_length` is lowered to what the
        model's context leaves beside the answer.
    """

    def __init__(
        self,
        model: Pretrained,
        *,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        batch_size: int = 8,
        text_format: TextFormat = TextFormat(),
    ):
        if model.network.config.head != "logits":
            raise ValueError(f"{model.origin}: a reward model cannot answer. Got: head='score'")
        if model.tokenizer is None:
            raise ValueError(f"{model.origin}: there is no tokenizer to read prompts with")
        room = model.network.config.context_length - max_new_tokens
        if room < 1 or max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                "max_new_tokens must be at least 1 and leave room for a prompt in the context of"
                f" {model.network.config.context_length} tokens, and batch_size must be at least"
                f" 1. Got: max_new_tokens={max_new_tokens}, batch_size={batch_size}"
            )
        self.model = model
        self._params = code_weights(model.params)
        self.batch_size = batch_size
        limit = room if text_format.max_length is None else min(room, text_format.max_length)
        self.text_format = dataclasses.replace(text_format, max_length=limit)
        self._generate = jax.jit(
            functools.partial(
                generate,
                model.network,
                sampling=sampling,
                eos_ids=model.eos_ids,
                max_new_tokens=max_new_tokens,
            ),
            static_argnames=("num_samples",),
        )

    def __call__(
        self,
        prompts: Sequence[Conversation],
        *,
        seed: int = 0,
        prompt_ids: Sequence[str] | None = None,
        num_samples: int = 1,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """Samples `num_samples` answers to each prompt.

        Args:
          prompts: raw prompts or conversations.
          seed: of all draws.
          prompt_ids: names that the draws depend on; by default the prompts' indices.
          num_samples: answers a prompt; each number is a program of its own.
          progress: whether to show a bar.

        Raises:
          ValueError: a prompt is empty or too long; nothing has been sampled then.
        """
        names = name_prompts(prompts, prompt_ids)
        rendered = [(self._render(index, prompt),) for index, prompt in enumerate(prompts)]
        answers: dict[int, list[Completion]] = {}
        bar = tqdm(total=len(prompts), unit="prompt", disable=not progress)
        for batch in batch_prompts(rendered, names, seed=seed, batch_size=self.batch_size):
            [padded] = batch.prompts
            arrays = (self._params, batch.keys, padded.tokens, padded.mask)
            with where(self._params):
                sampled = jax.device_get(self._generate(*arrays, num_samples=num_samples))
            for row, index in enumerate(batch.indices):
                answers[index] = [self._complete(sampled, row, n) for n in range(num_samples)]
            bar.update(len(batch.indices))
        bar.close()
        return [answers[index] for index in range(len(prompts))]

    def _render(self, index: int, prompt: Conversation) -> np.ndarray:
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        try:
            ids = render(tokenizer, prompt, text_format=self.text_format)
            check_ids(ids, self.model.network.config.vocab_size)
        except ValueError as error:
            raise ValueError(f"Prompt {index}: {error}") from error
        return ids

    def _complete(self, answers: Answers, row: int, sample: int) -> Completion:
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        tokens = tuple(map(int, answers.tokens[row, sample, : answers.lengths[row, sample]]))
        return Completion(
            text=tokenizer.decode(tokens, skip_special_tokens=True),
            tokens=tokens,
            finished=bool(answers.finished[row, sample]),
            log_prob=float(answers.log_probs[row, sample].sum()),
        )
