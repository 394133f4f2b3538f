"""The run's own programs, from abstract arrays, compiled for devices that need not be there.

    prefill        `GuidedSearch.root`
    beam step      `iro_jax.search.beam_step`; its two halves where a bridge stands between them
    sampling step  the same without value functions, as of the first rollouts

The training step is in `fits`. Memory and collectives are facts of what the compiler has made.
FLOPs and bytes it counts once for a loop, however often it turns: `counts` compiles programs in
which no loop turns more than once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.plan.experiment import Experiment, weights
from experiments.plan.placing import with_shardings
from iro_jax.guidance import GuidedParams, GuidedSearch
from iro_jax.guidance.bridge import Crossing, ForeignPrefix
from iro_jax.models import attention
from iro_jax.models.cache import Cache
from iro_jax.models.sharding import RULES, Rules, named_sharding, tree_shardings
from iro_jax.search.search import beam_step, expand_beams, select_beams, start

PyTree = Any


class TooLargeError(RuntimeError):
    """The compiler finds no room for a program."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      name: what it is.
      text: its HLO.
      memory: bytes a device, of `arguments`, `outputs` that are not arguments, and `temporaries`.
      cost: `flops` and `bytes` a device, loops counted once.
      seconds: that compiling took here.
    """

    name: str
    text: str
    memory: Mapping[str, int]
    cost: Mapping[str, float]
    seconds: float


def compile_program(
    name: str, function: Any, arguments: tuple, mesh: Mesh, *, donated: tuple[int, ...] = ()
) -> Program:
    """Compiles a function for the devices of a mesh."""
    platform = mesh.devices.flat[0].platform
    is_jitted = isinstance(function, jax.stages.Wrapped)
    jitted = function if is_jitted else jax.jit(function, donate_argnums=donated)
    begin = time.perf_counter()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        lowered = jitted.trace(*arguments).lower(
            lowering_platforms=("tpu",) if platform == "tpu" else None
        )
        # jaxlib cannot always read what libtpu has made: libtpu writes it down itself.
        options = {"xla_dump_to": dump} if platform == "tpu" else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TooLargeError(f"{name}: {str(error).splitlines()[0]}") from error
        text = _dumped(Path(dump)) if platform == "tpu" else compiled.as_text() or ""
    seconds = time.perf_counter() - begin
    logging.info("Compiled %s in %.0f s", name, seconds)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    return Program(
        name,
        text,
        {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        {"flops": cost.get("flops", 0.0), "bytes": cost.get("bytes accessed", 0.0)},
        seconds,
    )


def _dumped(folder: Path) -> str:
    """The program of a device, among all that the compiler writes down of it."""
    files = sorted(folder.glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size)
    if not files:
        raise RuntimeError("libtpu has left no text of the program that it has compiled")
    return files[-1].read_text()


@dataclasses.dataclass(frozen=True)
class Search:
    """The programs of one kind of search, as abstract calls.

    Attributes:
      experiment: what is run.
      mesh: where.
      num_prompts: P, in all.
      num_values: of the scorer; 0 is plain sampling.
      capacity: of the answers; the configured one if None.
      chunk_length: of the candidates; the configured one if None.
    """

    experiment: Experiment
    mesh: Mesh
    num_prompts: int
    num_values: int
    capacity: int | None = None
    chunk_length: int | None = None

    @functools.cached_property
    def guided(self) -> GuidedSearch:
        guided = self.experiment.guided(self.num_values, capacity=self.capacity)
        if self.chunk_length is None:
            return guided
        return dataclasses.replace(guided, chunk_length=self.chunk_length)

    def of_one_token(self) -> Search:
        """Whose `expand` reads one token of all candidates: no loop, and nothing is put off."""
        return dataclasses.replace(self, chunk_length=1)

    @functools.cached_property
    def params(self) -> GuidedParams:
        """Abstract parameters, placed as a run places them."""
        rules = self.experiment.value.network.rules
        policy = weights(self.guided.policy)
        scorer = self.experiment.scorer_params(self.num_values)
        return GuidedParams(
            with_shardings(policy, tree_shardings(policy, self.mesh, self.guided.policy.rules)),
            with_shardings(scorer, tree_shardings(scorer, self.mesh, rules)),
        )

    @functools.cached_property
    def keys(self) -> jax.ShapeDtypeStruct:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.num_prompts))
        return self._batched(keys)

    @functools.cached_property
    def prompts(self) -> tuple:
        """The arguments of `root` behind the parameters."""
        shape = (self.num_prompts, self.experiment.prompt_tokens)
        own = (self.integers(*shape), self.booleans(*shape))
        foreign = own if self.experiment.foreign and self.num_values else None
        return (*own, foreign)

    @functools.cached_property
    def state(self) -> PyTree:
        """The state of the search, abstract and placed."""

        def first(params, keys, *prompts):
            guided = self.guided
            return start(
                keys,
                guided.root(params, *prompts),
                beam_width=guided.beam_width,
                num_successors=guided.num_successors,
                chunk_length=guided.chunk_length,
                max_new_tokens=jnp.full(self.num_prompts, guided.capacity),
                capacity=guided.capacity,
                max_steps=guided.max_steps,
            )

        state = jax.eval_shape(first, self.params, self.keys, *self.prompts)
        trace = jax.tree.map(lambda x: self._batched(x, axis=1), state.trace)
        placed = self._placed(dataclasses.replace(state, trace=None))
        rules = self.experiment.value.network.rules
        return dataclasses.replace(
            placed, trace=trace, score_memory=self._placed(state.score_memory, rules)
        )

    @functools.cached_property
    def caches(self) -> dict[str, list[Cache]]:
        """The policy's, and those of the value networks."""

        def of(memory):
            leaves = jax.tree.leaves(memory, is_leaf=lambda x: isinstance(x, Cache))
            return [x for x in leaves if isinstance(x, Cache)]

        return {"policy": of(self.state.expand_memory), "values": of(self.state.score_memory)}

    def prefill(self) -> Program:
        call = (self.params, *self.prompts)
        return compile_program("prefill", self.guided.root, call, self.mesh)

    def step(self) -> list[Program]:
        """A beam step: one program, or its halves where the host comes in between."""
        if not (self.experiment.foreign and self.num_values):
            step = functools.partial(
                beam_step,
                expand_fn=self.guided.expand_fn,
                score_fn=self.guided.scorer,
                select_fn=self.guided.select_fn,
            )
            name = "beam step" if self.num_values else "sampling"
            return [self._compile(name, step, self._call)]
        return [self.expand(), self.select()]

    def expand(self) -> Program:
        """The first half of a beam step: all tokens of a chunk."""
        expand = functools.partial(expand_beams, expand_fn=self.guided.expand_fn)
        name = "beam step: sampling" if self.num_values else "sampling"
        return self._compile(name, expand, self._call)

    def select(self) -> Program:
        """The second half: values, selection, and the caches of the next beams."""
        expand = functools.partial(expand_beams, expand_fn=self.guided.expand_fn)
        candidates, _ = jax.eval_shape(expand, *self._call)
        if self.experiment.foreign:
            candidates = dataclasses.replace(candidates, features=self._crossing())
        select = functools.partial(
            select_beams, score_fn=self.guided.scorer, select_fn=self.guided.select_fn
        )
        call = (*self._call, self._placed(candidates))
        return self._compile("beam step: values and selection", select, call)

    @property
    def _call(self) -> tuple:
        return self.params, self.keys, self.state

    def _compile(self, name: str, function: Callable, call: tuple) -> Program:
        return compile_program(name, function, call, self.mesh, donated=(2,))

    def _crossing(self) -> Crossing:
        guided, slots = self.guided, self.experiment.value_slots
        lead = (self.num_prompts, guided.beam_width, guided.num_successors)

        one = self.integers(*lead)
        prefix = ForeignPrefix(self.integers(*lead, guided.max_steps * slots), one, one, one)
        return Crossing(self.integers(*lead, slots), one, one, prefix)

    def _placed(self, tree: PyTree, rules: Rules = RULES) -> PyTree:
        """Caches by their own rules, all else by its first axis, that of prompts."""

        def place(node):
            if isinstance(node, Cache):
                return with_shardings(node, node.shardings(self.mesh, rules))
            return self._batched(node)

        return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, Cache))

    def integers(self, *shape: int) -> Any:
        """An abstract array of prompts' integers, placed."""
        return self._batched(jax.ShapeDtypeStruct(shape, jnp.int32))

    def booleans(self, *shape: int) -> Any:
        """An abstract array of prompts' booleans, placed."""
        return self._batched(jax.ShapeDtypeStruct(shape, jnp.bool_))

    def _batched(self, x: Any, axis: int = 0) -> jax.ShapeDtypeStruct:
        names = ["batch" if place == axis else None for place in range(x.ndim)]
        sharding = named_sharding(names, x.shape, self.mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@contextlib.contextmanager
def whole_caches() -> Iterator[None]:
    """In the body, attention takes all slots and all queries at once instead of block by block.

    So that a program's FLOPs and bytes, in which the compiler counts one turn of every loop, are
    those of all slots that its caches have.
    """
    with (
        mock.patch.object(attention, "SLOT_BLOCK", 2**30),
        mock.patch.object(attention, "_QUERY_BLOCK", 2**30),
    ):
        yield
