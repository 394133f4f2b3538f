"""The run's programs from abstract arrays, compiled for eight CPU devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs.base import get_base
from experiments.plan.counts import DEPTHS, compiled_work
from experiments.plan.experiment import describe
from experiments.plan.fits import Update
from experiments.plan.hlo import collectives
from experiments.plan.placing import Places, device_bytes, mesh_of, mesh_sizes
from experiments.plan.plan import held_bytes, largest_gather, search_needs, whole_bytes
from experiments.plan.programs import Search
from iro_jax.guidance.guide import bridge_slots

PROMPTS = 4
LAYERS = 3


def config(folder, *, values="values", trainable="all"):
    """Policy and values of a few layers, with different tokenizers."""
    found = get_base()
    found.policy.update(name=str(folder / "policy.json"), dtype="bfloat16")
    found.mesh.update(fsdp=2, model=2)
    found.search.update(
        max_new_tokens=64, beam_width=2, num_successors=3, chunk_length=8, batch_size=PROMPTS
    )
    found.search.text_format.max_length = 32
    # The tops of the vocabulary's parts are gathered: fewer than a tiny cache has keys.
    found.search.sampling.top_k = 4
    found.value.update(backbone="policy", trainable=trainable)
    if values != "policy":
        found.value.update(backbone=str(folder / f"{values}.json"), dtype="bfloat16")
        found.value.head = None
    found.value.fit.update(batch_size=16, micro_batches=2)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import json

    found = tmp_path_factory.mktemp("shapes")
    policy = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    values = policy | {"vocab_size": 2048, "hidden_size": 32, "head_dim": 8}
    (found / "policy.json").write_text(json.dumps(policy))
    (found / "values.json").write_text(json.dumps(values))
    (found / "same.json").write_text(json.dumps(policy | {"hidden_size": 32, "head_dim": 8}))
    return found


@pytest.fixture(scope="module")
def experiment(folder):
    return describe(config(folder))


@pytest.fixture(scope="module")
def mesh(experiment):
    return mesh_of(jax.devices(), experiment.mesh)


def weight_bytes(config, shares):
    """By hand: matrices over `shares`, norms on every device; bf16."""
    width, queries = config.embed_dim, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    tables = 2 if config.head == "logits" else 1
    layer = width * (queries + 2 * keys) + queries * width + 3 * width * config.mlp_dim
    split = tables * config.vocab_size * width + config.num_layers * layer
    norms = (2 * config.num_layers + 1) * width
    score = width if config.head == "score" else 0
    return 2 * (split // shares + norms + score)


def cache_bytes(config, slots, shares):
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots // shares


def test_what_a_configuration_runs(experiment):
    assert experiment.foreign
    assert experiment.separate
    assert experiment.value_slots == bridge_slots(8) == 16
    assert experiment.value.network.config.head == "score"
    assert experiment.num_iterations == 3
    assert mesh_sizes(8, experiment.mesh) == {"data": 2, "fsdp": 2, "model": 2}


def test_weights_and_caches_are_those_of_the_shapes(experiment, mesh):
    held = held_bytes(experiment, mesh, PROMPTS)
    policy, value = experiment.policy.config, experiment.value.network.config
    assert held["weights of the policy"] == weight_bytes(policy, 2)
    # Three networks, and beta of each of them.
    assert held["weights of the value functions"] == 3 * weight_bytes(value, 2) + 3 * 4
    own = PROMPTS // 4
    beams, chunks = 64, 64 // 8
    of_keys = {
        "policy: prompt cache": cache_bytes(policy, own * 32, 2),
        "policy: beams cache": cache_bytes(policy, own * 2 * beams, 2),
        # A chunk's last token is read into its beam.
        "policy: chunk cache": cache_bytes(policy, own * 6 * (8 - 1), 2),
        "values: prompt cache": 3 * cache_bytes(value, own * 32, 2),
        "values: beams cache": 3 * cache_bytes(value, own * 2 * chunks * 16, 2),
        "values: chunk cache": 3 * cache_bytes(value, own * 6 * 16, 2),
    }
    for name, size in of_keys.items():
        # Beside keys and values there are positions and lengths, four bytes each.
        assert size < held[name] < 1.2 * size, name


def test_programs_hold_what_was_counted_and_gather_nothing_whole(experiment, mesh):
    needs, programs = search_needs(experiment, mesh, PROMPTS, guided=True)
    assert [program.name for program in programs] == [
        "prefill",
        "beam step: sampling",
        "beam step: values and selection",
    ]
    held = held_bytes(experiment, mesh, PROMPTS)
    reading, expanding, _ = programs
    weights = held["weights of the policy"] + held["weights of the value functions"]
    # Reading prompts ends in hidden states, not in logits.
    unembedding = experiment.policy.config.vocab_size * experiment.policy.config.embed_dim
    assert reading.memory["arguments"] == pytest.approx(weights - unembedding, rel=0.02)
    # What is only handed on is no argument: the values' weights.
    caches = sum(size for name, size in held.items() if "cache" in name)
    known = held["weights of the policy"] + caches
    assert known < expanding.memory["arguments"] < 1.3 * known
    # Caches come out where they go in: the prompts' are there and nothing else is new.
    assert reading.memory["outputs"] == pytest.approx(caches, rel=0.05)
    assert expanding.memory["outputs"] < 0.1 * caches
    assert all(need.total > need.resident > 0 for need in needs)
    whole = min(whole_bytes(experiment, mesh, PROMPTS).values())
    for program in programs:
        gathered = largest_gather(program)
        assert gathered is None or gathered.size < 0.5 * whole, (program.name, gathered)


def test_the_token_loop_sums_activations_twice_a_layer(experiment, mesh):
    program = Search(experiment, mesh, PROMPTS, 1).expand()
    along = dict(mesh.shape)
    inside = [x for x in collectives(program.text) if x.loops and x.axes(along) == ("model",)]
    size = 6 * experiment.policy.config.embed_dim
    wide = [x for x in inside if x.kind == "all-reduce" and x.size in (2 * size, 4 * size)]
    # Behind attention and the MLP of every layer.
    assert len(wide) == 2 * LAYERS
    along_batch = [x for x in collectives(program.text) if {"data", "fsdp"} & set(x.axes(along))]
    assert sum(x.size for x in along_batch) < 64  # flags: is somebody still at work?


def test_a_search_with_the_policys_tokenizer_is_one_step(folder, mesh):
    experiment = describe(config(folder, values="same"))
    assert not experiment.foreign
    [program] = Search(experiment, mesh, PROMPTS, 2).step()
    assert program.name == "beam step"
    assert program.cost["flops"] > 0


def test_heads_on_the_policy_have_no_network_of_their_own(folder, mesh):
    experiment = describe(config(folder, values="policy", trainable="head"))
    assert experiment.on_policy
    held = held_bytes(experiment, mesh, PROMPTS)
    width = experiment.policy.config.embed_dim
    assert held["weights of the value functions"] == 3 * (width + 1) * 4 + 3 * 4
    assert not any(size for name, size in held.items() if name.startswith("values:"))
    assert Search(experiment, mesh, PROMPTS, 2).step()[0].cost["flops"] > 0
    assert Update(experiment, mesh).update().cost["flops"] > 0


def test_a_fit_splits_what_it_trains_over_fsdp_and_model(experiment, mesh):
    update = Update(experiment, mesh)
    state = update.state
    network = experiment.value.network
    whole = 4 * sum(x.size for x in jax.tree.leaves(network.abstract_params()))
    assert device_bytes(state["params"]) == pytest.approx(whole / 4, rel=0.05)
    # Two moments of every parameter, and a few counters.
    moments = device_bytes(state["optimizer"]) - 2 * device_bytes(state["params"])
    assert 0 <= moments < 32
    program = update.update()
    assert program.memory["outputs"] < 0.01 * whole  # updates consume what they are given


def test_two_depths_tell_of_any_other(experiment, mesh):
    """Layers are alike: what is counted at one and two layers continues to five."""
    policy = experiment.policy.config
    deeper = dataclasses.replace(
        experiment,
        policy=dataclasses.replace(
            experiment.policy,
            config=policy.replace(layers=(*policy.layers, *policy.layers[:2])),
        ),
    )
    estimated = compiled_work(deeper, Places(mesh, mesh, 1), PROMPTS).token
    at_once = _token_at(deeper, mesh)
    assert max(DEPTHS) < deeper.policy.config.num_layers
    assert estimated.flops == pytest.approx(at_once.flops, rel=0.01)
    assert estimated.memory == pytest.approx(at_once.memory, rel=0.05)
    assert estimated.sent == pytest.approx(at_once.sent, rel=0.01)


def _token_at(experiment, mesh):
    from experiments.plan.counts import work_of
    from experiments.plan.programs import whole_caches

    with whole_caches():
        search = Search(experiment, mesh, PROMPTS, 1, capacity=32)
        return work_of(search.of_one_token().expand())


def test_attention_to_whole_caches_is_counted_once(experiment, mesh):
    """By hand: products of weights, and of all slots that there are."""
    config = experiment.policy.config
    found = _token_at(experiment, mesh).flops
    rows, width = PROMPTS // 4 * 6, config.embed_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = width * (queries + 2 * keys) + queries * width + 3 * width * config.mlp_dim
    attended = 2 * queries * (32 + 32 + 1)  # a prompt's slots, half an answer, a token's own
    by_hand = 2 * rows * (LAYERS * (layer + attended) + width * config.vocab_size) / 2
    assert by_hand < found < 1.3 * by_hand


def test_types_of_weights_follow_the_configuration(folder):
    found = config(folder)
    found.policy.dtype = "float32"
    experiment = describe(found)
    search = Search(experiment, mesh_of(jax.devices(), experiment.mesh), PROMPTS, 1)
    assert {x.dtype for x in jax.tree.leaves(search.params.policy)} == {jnp.dtype("float32")}
