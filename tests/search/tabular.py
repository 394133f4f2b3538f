"""Policies and values small enough to write down, as functions of the search.

A `Tabular` problem has a policy that looks at the position and the last token, rewards for
every complete answer, and the exact values of every prefix, found by enumeration. Token 0
ends an answer where `has_eos` is set.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from iro_jax.search import Chunk, Root, Scores

EOS = 0


@dataclasses.dataclass(frozen=True)
class Tabular:
    vocabulary: int
    horizon: int
    log_policy: np.ndarray  # [H, V + 1, V]: by position and last token (V: none yet)
    rewards: dict[tuple[int, ...], float]
    has_eos: bool

    @classmethod
    def random(cls, seed, vocabulary, horizon, *, has_eos=True, levels=4, spread=1.0):
        rng = np.random.default_rng(seed)
        logits = spread * rng.normal(size=(horizon, vocabulary + 1, vocabulary))
        log_policy = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        problem = cls(vocabulary, horizon, log_policy.astype(np.float32), {}, has_eos)
        for answer in problem.answers():
            problem.rewards[answer] = float(rng.integers(levels)) / 2
        return problem

    def is_complete(self, prefix):
        return len(prefix) == self.horizon or (self.has_eos and prefix[-1:] == (EOS,))

    def answers(self):
        for length in range(1, self.horizon + 1):
            for tokens in itertools.product(range(self.vocabulary), repeat=length):
                inner = self.has_eos and EOS in tokens[:-1]
                if not inner and self.is_complete(tokens):
                    yield tokens

    def step_log_probs(self, prefix):
        last = prefix[-1] if prefix else self.vocabulary
        return self.log_policy[len(prefix), last].astype(np.float64)

    def log_prob(self, answer):
        return sum(self.step_log_probs(answer[:i])[t] for i, t in enumerate(answer))

    def values(self, rewards=None):
        """The expected reward of every prefix, complete answers included."""
        rewards = self.rewards if rewards is None else rewards

        @functools.cache
        def value(prefix):
            if self.is_complete(prefix):
                return rewards[prefix]
            probabilities = np.exp(self.step_log_probs(prefix))
            return sum(p * value((*prefix, t)) for t, p in enumerate(probabilities))

        table, layer = {}, [()]
        while layer:
            table.update((prefix, value(prefix)) for prefix in layer)
            layer = [
                (*prefix, token)
                for prefix in layer
                if not self.is_complete(prefix)
                for token in range(self.vocabulary)
            ]
        return table

    def code_table(self, values):
        """Values as an array that `code` indexes, f32."""
        table = np.zeros((self.vocabulary + 1) ** self.horizon, np.float32)
        for prefix, value in values.items():
            table[code(prefix, self.vocabulary)] = value
        return table


def code(prefix, vocabulary):
    """A number for a prefix: its tokens plus one, as digits."""
    return sum((token + 1) * (vocabulary + 1) ** i for i, token in enumerate(prefix))


def codes(candidates, vocabulary):
    """The same numbers of all candidates, `[P, K, B]`."""
    from iro_jax.search import sequences

    tokens = sequences(candidates).reshape(*candidates.new.shape, -1)
    inside = jnp.arange(tokens.shape[-1]) < candidates.lengths[..., None]
    digits = jnp.where(inside, tokens + 1, 0)
    return jnp.sum(digits * (vocabulary + 1) ** jnp.arange(tokens.shape[-1]), axis=-1)


def table_scores(vocabulary):
    """`score_fn` that looks prefixes up in `params["totals"]` and `params["parts"]`."""

    def score_fn(params, candidates, memory):
        index = codes(candidates, vocabulary)
        rows = jnp.arange(index.shape[0])[:, None, None]
        return Scores(params["totals"][rows, index], params["parts"][rows, index]), memory

    return score_fn


def sampled_successors(chunk_length, has_eos):
    """`expand_fn` by the Gumbel-max rule, with the noise of `params["noise"][p, step, u, l]`.

    `params["log_policy"]` is `[P, H, V + 1, V]`.
    """

    def expand_fn(params, keys, frontier):
        del keys
        log_policy = params["log_policy"]
        prompts, horizon, _, vocabulary = log_policy.shape
        shape = frontier.open.shape
        noise = jax.vmap(lambda of_prompt, step: of_prompt[step])(params["noise"], frontier.step)
        noise = noise.reshape(*shape, chunk_length, vocabulary)
        beams = frontier.beams
        lasts = jnp.maximum(beams.lengths - 1, 0)[..., None]
        last = jnp.take_along_axis(beams.tokens, lasts, axis=-1)[..., 0]
        last = jnp.where(beams.lengths > 0, last, vocabulary)
        last = jnp.broadcast_to(last[..., None], shape)
        ended = jnp.zeros(shape, bool)
        tokens, log_probs = [], []
        lengths = jnp.zeros(shape, jnp.int32)
        rows = jnp.arange(prompts)[:, None, None]
        for i in range(chunk_length):
            position = jnp.minimum(beams.lengths[..., None] + i, horizon - 1)
            now = log_policy[rows, position, last]
            alive = ~ended & (i < frontier.room[..., None])
            token = jnp.argmax(now + noise[:, :, :, i], axis=-1)
            tokens.append(token)
            log_probs.append(jnp.take_along_axis(now, token[..., None], axis=-1)[..., 0])
            lengths += alive
            ended |= alive & (token == EOS) & has_eos
            last = token
        return Chunk(jnp.stack(tokens, -1), lengths, ended, jnp.stack(log_probs, -1)), None

    return expand_fn


def all_successors(vocabulary, chunk_length, has_eos):
    """`expand_fn` that enumerates every chunk: B must be `vocabulary ** chunk_length`."""
    chunks = np.array(list(itertools.product(range(vocabulary), repeat=chunk_length)))

    def expand_fn(params, keys, frontier):
        del params, keys
        shape = (*frontier.open.shape, chunk_length)
        tokens = jnp.broadcast_to(jnp.asarray(chunks), shape)
        is_eos = (tokens == EOS) & has_eos
        first = jnp.argmax(is_eos, axis=-1)
        lengths = jnp.where(is_eos.any(-1), first + 1, chunk_length)
        lengths = jnp.minimum(lengths, frontier.room[..., None])
        ended = jnp.take_along_axis(is_eos, (lengths - 1)[..., None], axis=-1)[..., 0]
        # What follows an EOS makes copies of one successor: the first of them stands for all.
        behind = jnp.arange(chunk_length) >= lengths[..., None]
        valid = jnp.all(~behind | (tokens == 0), axis=-1)
        return Chunk(tokens, lengths, ended, jnp.zeros(shape), valid=valid), None

    return expand_fn


def bare_root(num_prompts, num_values=1, totals=None):
    """Prompts that nobody has read, of score 0."""
    totals = jnp.zeros(num_prompts) if totals is None else jnp.asarray(totals)
    return Root(None, None, Scores(totals, jnp.zeros((num_prompts, num_values))))


def keys(num_prompts, seed=0):
    return jax.random.split(jax.random.key(seed), num_prompts)
