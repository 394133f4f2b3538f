"""How a frozen policy extends beams: the `expand_fn`s.

PolicySampler   samples B chunks of up to L tokens behind every beam
TopTokens       takes the B most probable next tokens of every beam
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from iro_jax.guidance.params import GuidedParams
from iro_jax.models import Cache, Network, Outputs, Sampling, draw, draw_keys
from iro_jax.models.cache import CachePart, inherit
from iro_jax.models.network import Depth, Want
from iro_jax.models.sampling import top_tokens
from iro_jax.models.stop import START, STOPPED
from iro_jax.search import Chunk, Frontier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyMemory:
    """What the policy remembers of every candidate; after a commit, of its beam.

    Attributes:
      cache: keys and values.
      hidden: after the last token that was read, `[P, K, B, D]`.
      stops: state of the stop strings' automaton after it, `[P, K, B]`.
    """

    cache: Cache
    hidden: Float[Array, "P K B D"]
    stops: Int[Array, "P K B"]

    def commit(self, parents: Int[Array, "P K"]) -> PolicyMemory:
        return PolicyMemory(
            cache=self.cache.commit(parents),
            hidden=inherit(self.hidden, parents),
            stops=inherit(self.stops, parents),
        )

    def admit(self, rows: Int[Array, " A"], newcomers: PolicyMemory) -> PolicyMemory:
        return PolicyMemory(
            cache=self.cache.admit(rows, newcomers.cache),
            hidden=self.hidden.at[rows].set(newcomers.hidden),
            stops=self.stops.at[rows].set(newcomers.stops),
        )


@dataclasses.dataclass(frozen=True)
class Segments:
    """Chunks that end where the policy is in doubt, as in CARDS (arXiv 2406.16306).

    Attributes:
      entropy: a chunk ends where the next token's entropy reaches this, in nats.
      min_tokens: but not before so many.
    """

    entropy: float = 3.0
    min_tokens: int = 4

    def __post_init__(self):
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1. Got: {self.min_tokens}")


@dataclasses.dataclass(frozen=True)
class PolicySampler:
    """Samples B chunks of up to L tokens behind every beam.

    L tokens take L steps of the network. The last token of a chunk is read as well: for heads on
    the policy's features, its hidden state is there when the candidates are scored. Where there
    are none, it is read at the beginning of the next chunk, for the beams that were kept.

    Attributes:
      network: the policy.
      sampling: how tokens are drawn.
      eos_ids: tokens that end an answer.
      chunk_length: L.
      features: hidden states to hand to the scorer, read at each candidate's last token:
        `hidden` or numbers of layers.
      segments: where chunks end before L tokens; None where they do not.
    """

    network: Network
    sampling: Sampling
    eos_ids: tuple[int, ...]
    chunk_length: int
    features: tuple[Depth, ...] = ()
    segments: Segments | None = None

    def root(
        self,
        params: GuidedParams,
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        *,
        beam_width: int,
        num_successors: int,
        max_steps: int,
    ) -> tuple[PolicyMemory, tuple[Float[Array, "P D"], ...]]:
        """Reads prompts.

        Returns:
          The memory of K beams, and the features at the prompts' last tokens.
        """
        cache = self.network.empty_cache(
            num_prompts=tokens.shape[0],
            prompt_slots=tokens.shape[1],
            beam_width=beam_width,
            beam_slots=max_steps * self.chunk_length,
            num_successors=num_successors,
            chunk_length=self.chunk_length - self._reads_later,
        )
        outputs, cache = self.network.prefill(params.policy, cache, tokens, mask, want=self._want)
        assert outputs.hidden is not None
        lead = (tokens.shape[0], beam_width, num_successors)
        hidden = jnp.broadcast_to(outputs.hidden[:, None, None], (*lead, outputs.hidden.shape[-1]))
        memory = PolicyMemory(cache, hidden, jnp.full(lead, START, jnp.int32))
        return memory, self._features(outputs)

    def __call__(
        self, params: GuidedParams, keys: Key[Array, " P"], frontier: Frontier
    ) -> tuple[Chunk, PolicyMemory]:
        """The `expand_fn`."""
        memory: PolicyMemory = frontier.memory
        shape, length = frontier.open.shape, self.chunk_length
        self._check_noise(params, frontier)
        first_position = frontier.step * length
        limits = jnp.minimum(frontier.room, length)[..., None]

        def draw_next(state):
            i, alive, chunk, memory = state
            position = first_position + i
            draw_key = draw_keys(keys, position, shape[1] * shape[2]).reshape(shape)
            noise = None
            if params.noise is not None:
                noise = params.noise[position, jnp.arange(shape[0])].reshape(*shape, -1)
            logits = self.network.logits(params.policy, memory.hidden)
            if self.segments is not None:
                alive = alive & ~((i >= self.segments.min_tokens) & self._in_doubt(logits))
            drawn = draw(draw_key, logits, self.sampling, noise, kernels=self.network.kernels)
            stops = self._advance(params, memory.stops, drawn.tokens)
            ends = self._is_eos(drawn.tokens) | (stops == STOPPED)

            def put(new, buffer):
                return lax.dynamic_update_index_in_dim(buffer, new, i, axis=-1)

            chunk = dataclasses.replace(
                chunk,
                tokens=put(drawn.tokens, chunk.tokens),
                lengths=chunk.lengths + alive,
                ended=chunk.ended | (alive & ends),
                log_probs=put(drawn.log_probs, chunk.log_probs),
            )
            memory = dataclasses.replace(memory, stops=jnp.where(alive, stops, memory.stops))
            return drawn.tokens, alive, alive & ~ends & (i + 1 < limits), chunk, memory

        def extend(state):
            tokens, drew, alive, chunk, memory = draw_next(state)
            outputs, cache = self.network.decode(
                params.policy, memory.cache, tokens[..., None], drew[..., None], want=self._want
            )
            outputs = jax.tree.map(lambda x: x[:, :, :, 0], outputs)

            def update(new, old):
                return jnp.where(drew[..., None], new, old)

            features = jax.tree.map(update, self._features(outputs), chunk.features)
            chunk = dataclasses.replace(chunk, features=features)
            hidden = update(outputs.hidden, memory.hidden)
            memory = dataclasses.replace(memory, cache=cache, hidden=hidden)
            return state[0] + 1, alive, chunk, memory

        def unfinished(state):
            i, alive, _, _ = state
            return (i < memory.cache.chunk.slots) & jnp.any(alive)

        empty = Chunk(
            tokens=jnp.zeros((*shape, length), jnp.int32),
            lengths=jnp.zeros(shape, jnp.int32),
            ended=jnp.zeros(shape, bool),
            log_probs=jnp.zeros((*shape, length), jnp.float32),
            features=tuple(jnp.zeros_like(memory.hidden) for _ in self.features),
        )
        if self._reads_later:
            memory = self._read_last(params, memory, frontier)
        alive = frontier.open & (limits > 0)
        state = lax.while_loop(unfinished, extend, (jnp.int32(0), alive, empty, memory))
        if self._reads_later:
            *_, chunk, memory = draw_next(state)
        else:
            *_, chunk, memory = state
        return chunk, memory

    @property
    def _reads_later(self) -> bool:
        """Whether the last tokens of chunks are read when only those of the kept ones are left.

        Nobody may want to know a candidate's hidden state then, and an unfinished one must have
        all L tokens.
        """
        return not self.features and self.segments is None and self.chunk_length > 1

    def _read_last(
        self, params: GuidedParams, memory: PolicyMemory, frontier: Frontier
    ) -> PolicyMemory:
        """Reads the last token of every unfinished beam that has any."""
        cache, beams = memory.cache, frontier.beams
        last = jnp.maximum(beams.lengths - 1, 0)[..., None]
        tokens = jnp.take_along_axis(beams.tokens, last, axis=-1)
        unread = ((frontier.step > 0)[:, None] & ~beams.finished)[..., None]
        config, rules = self.network.config, self.network.rules
        place = CachePart.empty(config, tokens.shape, slots=1).pinned(rules)

        def read():
            outputs, read = self.network.decode(
                params.policy,
                dataclasses.replace(cache, chunk=place),
                tokens[..., None],
                unread[..., None],
                want=("hidden",),
            )
            assert outputs.hidden is not None
            hidden = jnp.where(unread[..., None], outputs.hidden[..., 0, :], memory.hidden)
            return hidden, read.chunk

        # Nothing is left to read before the first chunk.
        hidden, last_one = lax.cond(jnp.any(unread), read, lambda: (memory.hidden, place))
        whole = cache.beams.append(last_one.of_one_candidate())
        return dataclasses.replace(
            memory, cache=dataclasses.replace(cache, beams=whole), hidden=hidden
        )

    def _in_doubt(self, logits: Float[Array, "P K B V"]) -> Bool[Array, "P K B"]:
        assert self.segments is not None
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1) >= self.segments.entropy

    def _check_noise(self, params: GuidedParams, frontier: Frontier) -> None:
        if params.noise is None:
            return
        if self.segments is not None:
            raise ValueError("Noise goes by position, which chunks of any length do not know")
        prompts, width, successors = frontier.open.shape
        positions = frontier.beams.tokens.shape[-1]
        wanted = (prompts, width * successors, self.network.config.vocab_size)
        if params.noise.shape[0] < positions or params.noise.shape[1:] != wanted:
            raise ValueError(
                f"noise must be of shape [at least {positions}, prompts, candidates, vocabulary] ="
                f" [{positions}, {', '.join(map(str, wanted))}]. Got: {list(params.noise.shape)}"
            )

    @property
    def _want(self) -> tuple[Want, ...]:
        return tuple(dict.fromkeys(("hidden", *self.features)))

    def _features(self, outputs: Outputs) -> tuple[Array, ...]:
        return tuple(outputs.at(depth) for depth in self.features)

    def _is_eos(self, tokens: Int[Array, "P K B"]) -> Bool[Array, "P K B"]:
        return jnp.isin(tokens, jnp.asarray(self.eos_ids, jnp.int32))

    def _advance(self, params: GuidedParams, stops: Array, tokens: Array) -> Array:
        return stops if params.stop_table is None else params.stop_table[stops, tokens]


@dataclasses.dataclass(frozen=True)
class TopTokens(PolicySampler):
    """The B most probable next tokens of every beam, in falling order: token-wise methods.

    Nothing is drawn. Chunks have one token; their log-probabilities are the policy's own, at
    temperature 1.
    """

    def __call__(
        self, params: GuidedParams, keys: Key[Array, " P"], frontier: Frontier
    ) -> tuple[Chunk, PolicyMemory]:
        """The `expand_fn`."""
        del keys
        memory: PolicyMemory = frontier.memory
        # What a beam's B slots remember is one and the same.
        logits = self.network.logits(params.policy, memory.hidden[:, :, 0])
        log_probs, tokens = top_tokens(logits, frontier.open.shape[-1])
        outputs, cache = self.network.decode(
            params.policy,
            memory.cache,
            tokens[..., None],
            frontier.open[..., None],
            want=self._want,
        )
        outputs = jax.tree.map(lambda x: x[:, :, :, 0], outputs)
        assert outputs.hidden is not None
        stops = self._advance(params, memory.stops, tokens)
        chunk = Chunk(
            tokens=tokens[..., None],
            lengths=jnp.ones(tokens.shape, jnp.int32),
            ended=self._is_eos(tokens) | (stops == STOPPED),
            log_probs=log_probs[..., None],
            features=self._features(outputs),
        )
        return chunk, PolicyMemory(cache, outputs.hidden, stops)
