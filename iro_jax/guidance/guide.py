"""Guided answers from text to text.

`Guide` renders prompts, sorts them into buckets, runs a `GuidedSearch` on each batch, and
lets a reward, the values or a vote pick the answer. `value_scorer` makes a scorer from
checkpoints, with a bridge where their tokenizer is not the policy's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from iro_jax.guidance.answers import (
    AnswerSource,
    FinalChoice,
    Guided,
    Reward,
    Selection,
    Vote,
    in_order,
)
from iro_jax.guidance.bridge import Bridge, BridgedValues
from iro_jax.guidance.guided import GuidedSearch
from iro_jax.guidance.params import GuidedParams
from iro_jax.guidance.policy import Segments
from iro_jax.guidance.scorers import (
    LogRatio,
    NoScore,
    Scorer,
    ValueSum,
    ValueSumParams,
    Watching,
)
from iro_jax.models import (
    Conversation,
    Network,
    Pretrained,
    Sampling,
    TextFormat,
    code_weights,
    pad_prompts,
    render,
    same_tokenizer,
)
from iro_jax.models.generate import (
    KeyedBatch,
    batch_prompts,
    bucket_groups,
    name_prompts,
    prompt_keys,
)
from iro_jax.models.sharding import mesh_of, run_where, where
from iro_jax.models.stop import cut, stop_table
from iro_jax.models.text import check_ids, end_of_turn
from iro_jax.models.token_bytes import token_bytes
from iro_jax.search import SearchOutput, SelectFn, check_scores, diversity_first, per_parent, top_k
from iro_jax.values import (
    AnyNetwork,
    RecomputedNetwork,
    ValueNetwork,
    ValueParams,
    stack_networks,
)

Driver = Literal["auto", "program", "host", "continuous"]


class Guide:
    """Answers text with text, guided.

    Args:
      policy: the frozen model with its tokenizer.
      scorer: what guides it, and `scorer_params`, its parameters.
      scorer_tokenizer: for prompts, if the scorer reads them with another tokenizer.
      sampling: how the policy's tokens are drawn.
      beam_width, num_successors, chunk_length: K, B and L.
      max_new_tokens: longest answer, in tokens.
      select_fn: which candidates survive.
      final_selection: what picks the answer.
      reward: for `final_selection="reward"`.
      vote: for `final_selection="majority"`: what an answer says, for example the number in
        its last line, or None if it says nothing.
      stop_strings: texts that end an answer, and are cut off.
      end_characters: an answer also ends with a token whose text ends in one of these, such as
        `.!?` for one sentence; it keeps that token.
      batch_size: prompts a program call; incomplete batches are filled up.
      text_format: how prompts are rendered. Its `max_length` is lowered to what the models'
        contexts leave beside the answer.
      successors, segments: how beams are extended; see `GuidedSearch`.
      answers: what answers are chosen from: `finalists`, or the last `beams`.
      driver: `program` runs a whole search as one program, `host` a program a chunk, `continuous`
        too, and lets waiting prompts take the places of those that are done: for answers of
        different lengths, where no bridge is needed. `auto` takes `host` where a bridge is needed
        and the platform is not one CPU, otherwise `program`.
    """

    def __init__(
        self,
        policy: Pretrained,
        scorer: Scorer = NoScore(),
        scorer_params: object = None,
        *,
        scorer_tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling = Sampling(),
        beam_width: int = 4,
        num_successors: int = 4,
        chunk_length: int = 16,
        max_new_tokens: int = 256,
        select_fn: SelectFn = diversity_first,
        final_selection: Selection = "value",
        reward: Reward | None = None,
        vote: Vote | None = None,
        stop_strings: Sequence[str] = (),
        end_characters: str = "",
        batch_size: int = 8,
        text_format: TextFormat = TextFormat(),
        successors: Literal["sampled", "top_tokens"] = "sampled",
        segments: Segments | None = None,
        answers: AnswerSource = "finalists",
        driver: Driver = "auto",
    ):
        if policy.tokenizer is None:
            raise ValueError(f"{policy.origin}: there is no tokenizer to read prompts with")
        if driver not in get_args(Driver):
            raise ValueError(f"driver must be one of {get_args(Driver)}. Got: {driver!r}")
        if driver == "continuous" and scorer_tokenizer is not None:
            raise ValueError("A scorer with another tokenizer cannot be driven continuously")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1. Got: {batch_size}")
        if isinstance(scorer, BridgedValues) != (scorer_tokenizer is not None):
            raise ValueError("A scorer with a bridge and a scorer_tokenizer belong together")
        self.policy = policy
        self.tokenizer: PreTrainedTokenizerBase = policy.tokenizer
        self.scorer_tokenizer = scorer_tokenizer
        self.batch_size = batch_size
        self.final_choice = FinalChoice(final_selection, reward, vote, answers)
        self.stop_strings = tuple(stop_strings)
        self.search = GuidedSearch(
            policy=policy.network,
            scorer=scorer,
            sampling=sampling,
            eos_ids=(*policy.eos_ids, *self._ending(end_characters)),
            beam_width=beam_width,
            num_successors=num_successors,
            chunk_length=chunk_length,
            capacity=max_new_tokens,
            select_fn=select_fn,
            successors=successors,
            segments=segments,
        )
        table = None
        if self.stop_strings:
            vocabulary = policy.network.config.vocab_size
            self._token_bytes = token_bytes(self.tokenizer, vocabulary)
            table = jnp.asarray(stop_table(self.stop_strings, self._token_bytes))
        self.params = code_weights(GuidedParams(policy.params, scorer_params, table))
        contexts = [network.config.context_length for network in _networks(self.search)]
        self.text_format = text_format.beside(max_new_tokens, contexts)
        # A program that asks the host in between is for one CPU.
        elsewhere = jax.default_backend() != "cpu" or mesh_of(policy.params) is not None
        off_program = isinstance(scorer, BridgedValues) and elsewhere
        self._from_host = driver == "host" or (driver == "auto" and off_program)
        self._continuous = self.search.continuous(batch_size) if driver == "continuous" else None
        self._programs = [(self.search, self._compile(self.search))]

    def __call__(
        self,
        prompts: Sequence[Conversation],
        *,
        seed: int = 0,
        prompt_ids: Sequence[str] | None = None,
        trees: int = 0,
        progress: bool = False,
    ) -> list[Guided]:
        """Answers prompts.

        Args:
          prompts: raw prompts or conversations.
          seed: of all draws.
          prompt_ids: names that the draws depend on; by default the prompts' indices.
          trees: of how many prompts, the first ones, results tell all candidates.
          progress: whether to show a bar.

        Raises:
          ValueError: a prompt is empty or too long (nothing has been sampled then), or a
            score or reward is not finite.
        """
        names = name_prompts(prompts, prompt_ids)
        rendered = [self._render(index, prompt) for index, prompt in enumerate(prompts)]
        by_score = self.search.select_fn in (diversity_first, per_parent, top_k)

        def choose(index: int, output: SearchOutput, row: int) -> Guided:
            return self.final_choice(
                prompts[index], output, row, self._read, trees=index < trees, by_score=by_score
            )

        def found() -> Iterator[tuple[int, Guided]]:
            for indices, output in self._search_all(rendered, names, seed):
                for row, index in enumerate(indices):
                    yield index, choose(index, output, row)

        return in_order(found(), len(prompts), progress=progress)

    def _search_all(
        self, rendered: Sequence[tuple[np.ndarray, ...]], names: Sequence[str], seed: int
    ) -> Iterator[tuple[Sequence[int], SearchOutput]]:
        """Prompts and what was found for them, on the host, as soon as it is."""
        if self._continuous is None:
            for batch in batch_prompts(rendered, names, seed=seed, batch_size=self.batch_size):
                with where(self.params):
                    output = jax.device_get(self._search_batch(batch))
                yield batch.indices, output
            return
        for group in bucket_groups(rendered, self.batch_size):
            padded = pad_prompts([rendered[index][0] for index in group])
            keys = prompt_keys(seed, [names[index] for index in group])
            found = self._continuous(
                self.params,
                keys,
                (padded.tokens, padded.mask),
                max_new_tokens=self.search.capacity,
            )
            for number, output in run_where(self.params, found):
                check_scores(output, first=group[number])
                yield (group[number],), output

    def _ending(self, characters: str) -> list[int]:
        if not characters:
            return []
        pieces = token_bytes(self.tokenizer, self.policy.network.config.vocab_size)
        ends = tuple(character.encode() for character in characters)
        special = {*self.tokenizer.all_special_ids, *self.policy.eos_ids}
        return [i for i, piece in enumerate(pieces) if piece.endswith(ends) and i not in special]

    def check(self, prompts: Sequence[Conversation]) -> None:
        """Raises a ValueError where a prompt is empty or too long; samples nothing."""
        for index, prompt in enumerate(prompts):
            self._render(index, prompt)

    def render(self, prompt: Conversation) -> Int[np.ndarray, " S"]:
        """A prompt as the policy sees it."""
        return render(self.tokenizer, prompt, text_format=self.text_format)

    def _compile(self, search: GuidedSearch) -> Callable[..., SearchOutput]:
        if not self._from_host:
            return jax.jit(search)
        read, from_host = jax.jit(search.root), search.on_host()

        def run(params, keys, tokens, mask, limit, foreign):
            root = read(params, tokens, mask, foreign)
            return from_host(params, keys, root, max_new_tokens=limit, check=False)

        return run

    def _search_batch(self, batch: KeyedBatch) -> SearchOutput:
        own, *others = [(prompts.tokens, prompts.mask) for prompts in batch.prompts]
        foreign = others[0] if others else None
        # Rows that fill the batch up must not keep it waiting.
        limit = np.ones(self.batch_size, np.int32)
        limit[: len(batch.indices)] = self.search.capacity
        # Every batch begins with the first program: its answers must not depend on whether an
        # earlier one has needed a wider bridge.
        for level in itertools.count():
            search, run = self._programs[level]
            output = run(self.params, batch.keys, *own, jnp.asarray(limit), foreign)
            if not _overflowed(search, output):
                break
            if level + 1 == len(self._programs):
                wider = _widened(search)
                self._programs.append((wider, self._compile(wider)))
        check_scores(output)
        return output

    def _render(self, index: int, prompt: Conversation) -> tuple[np.ndarray, ...]:
        readers = [(self.tokenizer, self.policy.network)]
        if self.scorer_tokenizer is not None:
            readers.append((self.scorer_tokenizer, _networks(self.search)[-1]))
        try:
            rendered = tuple(
                render(tokenizer, prompt, text_format=self.text_format) for tokenizer, _ in readers
            )
            for ids, (_, network) in zip(rendered, readers, strict=True):
                check_ids(ids, network.config.vocab_size)
        except ValueError as error:
            raise ValueError(f"Prompt {index}: {error}") from error
        return rendered

    def _read(self, tokens: tuple[int, ...]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if not self.stop_strings:
            return text
        # Some tokenizers drop a leading space, with which a stop string may begin.
        starts = b"".join(self._token_bytes[token] for token in tokens)[:1]
        dropped = " " if starts == b" " and not text.startswith(" ") else ""
        return cut(dropped + text, self.stop_strings).removeprefix(dropped)


def value_scorer(
    policy: Pretrained,
    models: Sequence[Pretrained],
    betas: Sequence[float],
    *,
    networks: Sequence[tuple[ValueNetwork, ValueParams]] | None = None,
    chunk_length: int = 16,
    chat: bool = False,
    stacked: bool | None = None,
    recomputed: bool = False,
) -> tuple[Scorer, ValueSumParams, PreTrainedTokenizerBase | None]:
    """A scorer from checkpoints: the sum of V_t / beta_t.

    Args:
      policy: the model to guide.
      models: value functions, all with one tokenizer; score networks, unless `networks`
        says how each of them becomes a value network.
      betas: beta_t of every value function.
      networks: value networks and their parameters, in the order of `models`.
      chunk_length: L of the search, from which a bridge's first guess of its slots comes.
      chat: whether prompts are conversations, whose answers end with the template's token.
      stacked: whether neighbours of one architecture are read in one batched program, from a
        copy of their parameters; by default on accelerators, unless they are large. See
        `iro_jax.values.stack_networks`.
      recomputed: whether networks keep no keys and values, but read the prompt and the beams again
        at every chunk: less memory, more time. See `iro_jax.values.RecomputedNetwork`.

    Returns:
      The scorer, its parameters, and the tokenizer it reads prompts with if that is not the
      policy's: the arguments of `Guide`.

    Raises:
      ValueError: tokenizers are missing or differ between the models, or betas are not
        positive numbers, one for each value function, or networks were to be both stacked and
        recomputed.
    """
    values, params, own = value_sum(models, betas, networks, stacked=stacked, recomputed=recomputed)
    of_policy = _tokenizer(policy)
    if same_tokenizer(of_policy, own):
        return values, params, None
    bridge = Bridge(
        token_bytes(of_policy, policy.network.config.vocab_size),
        policy.eos_ids,
        own,
        end_of_turn(own, chat=chat),
        vocab_size=models[0].network.config.vocab_size,
        slots=bridge_slots(chunk_length),
    )
    return BridgedValues(values, bridge), params, own


def bridge_slots(chunk_length: int) -> int:
    """What a bridge is given for the tokens of a chunk, those that it reads again included.

    One chunk that needs more has its whole batch searched again. Of Gemma's chunks of 4 tokens, in
    SmolLM2's, one in 500 needs more than 8 and none of 1,536 more than 10; of those of 16 none more
    than 23.
    """
    return max(2 * chunk_length, chunk_length + 8)


def value_sum(
    models: Sequence[Pretrained],
    betas: Sequence[float],
    networks: Sequence[tuple[ValueNetwork, ValueParams]] | None = None,
    *,
    stacked: bool | None = None,
    recomputed: bool = False,
) -> tuple[ValueSum, ValueSumParams, PreTrainedTokenizerBase]:
    """The sum of V_t / beta_t, its parameters, and the tokenizer of its networks.

    The arguments, and what is wrong with them, are those of `value_scorer`.
    """
    if networks is None:
        networks = [(ValueNetwork(model.network), ValueParams(model.params)) for model in models]
    count = ValueSum(tuple(network for network, _ in networks)).num_values
    if len(betas) != count or not all(0 < beta < float("inf") for beta in betas):
        raise ValueError(
            f"betas must be {count} positive numbers, one for each value function."
            f" Got: {list(betas)}"
        )
    own, *others = [_tokenizer(model) for model in models]
    if any(not same_tokenizer(own, other) for other in others):
        raise ValueError("The value functions of one scorer need one tokenizer. Got: several")
    if stacked and recomputed:
        raise ValueError("Networks can be stacked or recomputed. Got: both")
    passes: Sequence[tuple[AnyNetwork, ValueParams]] = (
        [(RecomputedNetwork(network), own_params) for network, own_params in networks]
        if recomputed
        else stack_networks(networks, stacked)
    )
    values = ValueSum(tuple(network for network, _ in passes))
    params = ValueSumParams(tuple(p for _, p in passes), jnp.asarray(betas, jnp.float32))
    return values, params, own


def _overflowed(search: GuidedSearch, output: SearchOutput) -> bool:
    """Whether the bridge had too few slots for what came out; asked once for each output."""
    scorer = search.scorer
    jax.block_until_ready(output.nonfinite)
    if not isinstance(scorer, BridgedValues):
        return False
    overflowed, scorer.bridge.overflowed = scorer.bridge.overflowed, False
    return overflowed


def _widened(search: GuidedSearch) -> GuidedSearch:
    """The search with twice the slots for its bridge."""
    assert isinstance(search.scorer, BridgedValues)
    scorer = dataclasses.replace(search.scorer, bridge=search.scorer.bridge.widened())
    return dataclasses.replace(search, scorer=scorer)


def _tokenizer(model: Pretrained) -> PreTrainedTokenizerBase:
    if model.tokenizer is None:
        raise ValueError(f"{model.origin}: there is no tokenizer")
    return model.tokenizer


def _networks(search: GuidedSearch) -> list[Network]:
    scorer = search.scorer
    if isinstance(scorer, Watching):
        scorer = scorer.scorer
    if isinstance(scorer, BridgedValues):
        scorer = scorer.values
    if isinstance(scorer, ValueSum):
        return [search.policy, *(network.network for network in scorer.networks)]
    if isinstance(scorer, LogRatio):
        return [search.policy, scorer.tuned, scorer.untuned]
    return [search.policy]
