"""What the parts of a run do on a GPU, counted from shapes; nothing is compiled.

FLOPs are those of `iro_jax.models.flops`; bytes are weights and cache slots, each read once a pass;
what is sent are two sums of activations a layer over the mesh's `model` axis, and the gathered
weights and scattered gradients of a fit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.plan.estimate import SearchWork, Work
from experiments.plan.experiment import Experiment
from experiments.plan.fits import Update
from experiments.plan.placing import Places, device_bytes
from experiments.plan.programs import Search
from iro_jax.models import TransformerConfig
from iro_jax.models.flops import forward_flops


def counted_work(experiment: Experiment, places: Places, num_prompts: int) -> SearchWork:
    """As `counts.compiled_work`, for devices without a compiler at hand."""
    mesh = places.own
    search = experiment.search
    candidates = num_prompts * search.beam_width * search.num_successors
    half = experiment.answer_tokens // 2
    prompt = experiment.prompt_tokens
    beams = num_prompts * search.beam_width * search.max_new_tokens
    value = experiment.value_networks(1)[0].network.config
    of_search = Search(experiment, mesh, num_prompts, 1)
    policy_bytes = device_bytes(of_search.params.policy)
    shared = num_prompts * (prompt + search.beam_width * half)
    own = candidates * search.chunk_length

    def reading(
        config: TransformerConfig, held: float, texts: int, new: int, before: int, slots: int
    ) -> Work:
        """`new` tokens of each text behind `before`, with so many slots of caches read."""
        flops = texts * forward_flops(config, new, before, outputs=0)
        tokens = texts * new
        return Work(
            flops / mesh.size,
            held + slots * slot_bytes(config) / mesh.size,
            _summed(config, tokens, mesh),
        )

    def drawing(work: Work) -> Work:
        config = experiment.policy.config
        return work + Work(2.0 * candidates * config.embed_dim * config.vocab_size / mesh.size)

    def copying(config: TransformerConfig, slots: int) -> Work:
        return Work(0.0, 2.0 * slots * slot_bytes(config) / mesh.size, 0.0)

    policy = experiment.policy.config
    texts = num_prompts
    parts = {
        "prefill": reading(policy, policy_bytes, texts, prompt, 0, texts * prompt),
        "token": drawing(reading(policy, policy_bytes, candidates, 1, prompt + half, shared + own)),
        "commit": copying(policy, beams),
        "sample": drawing(
            reading(
                policy,
                policy_bytes,
                candidates,
                1,
                prompt + half,
                num_prompts * prompt + candidates * search.max_new_tokens,
            )
        ),
    }
    if not experiment.on_policy:
        held = device_bytes(of_search.params.scorer.networks[0])
        new = experiment.value_slots
        stretched = new // search.chunk_length
        parts |= {
            "value_prefill": reading(value, held, texts, prompt, 0, texts * prompt),
            "value_chunk": reading(value, held, candidates, new, prompt + half, shared + own),
            "value_commit": copying(value, stretched * beams),
        }
    return SearchWork(**parts, **_fit(experiment, places.mesh))


def _fit(experiment: Experiment, mesh: Mesh) -> dict[str, Work]:
    settings = experiment.fitting
    update = Update(experiment, mesh)
    rollouts, rows, slots = update.sizes
    parts = settings.fit.micro_batches
    config = experiment.value.network.config
    trained = sum(x.size for x in jax.tree.leaves(update.state["params"]))
    held = device_bytes(update.state["params"])
    optimizer = Work(10.0 * trained / mesh.size, 7.0 * held)
    if settings.trainable == "head":
        states = rollouts * slots * config.embed_dim / parts / mesh.size
        return {"gradient": Work(6 * states, 8 * states), "optimizer": optimizer}
    passes = {"adapters": 2, "all": 3}[settings.trainable] + settings.remat
    flops = passes * rows / parts * forward_flops(config, slots, outputs=0) / mesh.size
    tokens = rows * slots // parts
    itemsize = jnp.dtype(settings.dtype).itemsize
    activations = 2 * passes * tokens * config.embed_dim * config.num_layers * itemsize
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    gathered = (passes + 1) * held * (mesh.shape["fsdp"] - 1)
    summed = 2 * held * (mesh.shape["data"] - 1) / mesh.shape["data"]
    sent = passes * _summed(config, tokens, mesh) + gathered + summed
    memory = passes * held + activations / shards
    return {"gradient": Work(flops, memory, sent), "optimizer": optimizer}


def _summed(config: TransformerConfig, tokens: int, mesh: Mesh) -> float:
    """Bytes that a device sends for the sums behind attention and behind the MLP."""
    model = mesh.shape["model"]
    size = tokens / (mesh.size / model) * config.embed_dim * jnp.dtype(config.dtype).itemsize
    return 2.0 * config.num_layers * 2 * size * (model - 1) / model


def slot_bytes(config: TransformerConfig) -> int:
    """Of one token's keys and values in all layers."""
    of_layer = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return config.num_layers * of_layer
