"""The search of one prompt in plain PyTorch, written from its description and nothing else.

Lists and loops, no caches: every token and every score re-reads whole sequences. It shares no
code with `iro_jax`. Letters: D width, U candidates, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer so far. `birth` is the step and the candidate that added its last chunk."""

    tokens: Tokens = ()
    ended: bool = False
    truncated: bool = False
    score: float = 0.0
    birth: tuple[int, int] = (-1, -1)

    @property
    def finished(self) -> bool:
        return self.ended or self.truncated


@dataclasses.dataclass
class Result:
    """Complete answers, the best first; of every step, its competitors and who survived."""

    ranked: list[Answer]
    candidates: list[dict[int, Answer]]
    selected: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Search:
    """The sizes of a search, and how the policy's tokens are drawn."""

    beam_width: int
    num_successors: int
    chunk_length: int
    limit: int
    eos_ids: tuple[int, ...]
    temperature: float
    top_k: int

    def __call__(
        self,
        next_logits: Callable[[list[Tokens]], torch.Tensor],
        score: Callable[[list[Tokens]], list[float]],
        noise: np.ndarray,
    ) -> Result:
        """Searches.

        Args:
          next_logits: of the next token behind each of n answers, `[n, V]`.
          score: of each answer's last token.
          noise: Gumbel noise by answer position and candidate, `[positions, U, V]`.
        """
        beams = [Answer() for _ in range(self.beam_width)]
        pool: list[Answer] = []
        result = Result([], [], [])
        while not all(beam.finished for beam in beams):
            step = len(result.selected)
            candidates = {}
            for row, beam in enumerate(beams):
                first = row * self.num_successors
                copies = 1 if beam.finished else self.num_successors
                candidates |= {first + slot: beam for slot in range(copies)}
            new = [index for index, answer in candidates.items() if not answer.finished]
            self._sample(candidates, new, step, next_logits, noise)
            self._score(candidates, new, step, score)

            selected = diversity_first(candidates, self.beam_width)
            beams = [candidates[index] for index in selected]
            result.candidates.append(candidates)
            result.selected.append(selected)
            for answer in beams:
                if answer.finished and answer not in pool:
                    pool.append(answer)
            pool = best_first(pool)[: self.beam_width * self.num_successors]
        last = [answer for answer in result.candidates[-1].values() if answer.finished]
        result.ranked = best_first(pool + [answer for answer in last if answer not in pool])
        return result

    def _sample(self, candidates, new, step, next_logits, noise):
        """Extends the new candidates token by token until their chunks end."""
        for place in range(self.chunk_length):
            alive = [index for index in new if not candidates[index].finished]
            if not alive:
                return
            logits = _once_each(next_logits, [candidates[index].tokens for index in alive])
            for index, of_index in zip(alive, logits, strict=True):
                position = step * self.chunk_length + place
                token = draw(of_index, self.temperature, self.top_k, noise[position, index])
                tokens = (*candidates[index].tokens, token)
                ended = token in self.eos_ids
                candidates[index] = Answer(
                    tokens, ended=ended, truncated=not ended and len(tokens) == self.limit
                )

    @staticmethod
    def _score(candidates, new, step, score):
        scores = _once_each(score, [candidates[index].tokens for index in new])
        for index, value in zip(new, scores, strict=True):
            candidates[index] = dataclasses.replace(
                candidates[index], score=value, birth=(step, index)
            )


def draw(logits: torch.Tensor, temperature: float, top_k: int, noise: np.ndarray) -> int:
    """The Gumbel-max rule after temperature and top-k."""
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    kept = torch.topk(log_probs, top_k).indices
    perturbed = torch.full_like(log_probs, -torch.inf)
    perturbed[kept] = log_probs[kept] + torch.tensor(noise)[kept]
    return int(torch.argmax(perturbed))


def diversity_first(candidates: dict[int, Answer], width: int) -> list[int]:
    """Algorithm 5: the best of every group of identical answers, then the best of the rest."""
    falling = sorted(candidates, key=lambda index: (-candidates[index].score, index))
    groups = {candidates[index].tokens: index for index in reversed(falling)}
    first = [index for index in falling if groups[candidates[index].tokens] == index]
    return (first + [index for index in falling if index not in first])[:width]


def best_first(answers: list[Answer]) -> list[Answer]:
    """By falling score; of equals the one that was there first."""
    return sorted(answers, key=lambda answer: -answer.score)


class Model:
    """A causal language model of `transformers` that reads whole sequences."""

    def __init__(self, folder, gguf_file: str):
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=torch.float32
        ).eval()

    def hidden(self, sequences: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        """Per depth and sequence the hidden states at its tokens, `[length, D]`."""
        longest = max(map(len, sequences))
        padded = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences])
        mask = torch.tensor([[i < len(s) for i in range(longest)] for s in sequences])
        with torch.inference_mode():
            output = self._model.model(
                padded, attention_mask=mask.long(), output_hidden_states=True, use_cache=False
            )
        return [
            [states[: len(s)] for states, s in zip(of_depth, sequences, strict=True)]
            for of_depth in output.hidden_states
        ]

    def last_hidden(
        self, prompt: Sequence[int], answers: list[Tokens], depth: int = -1
    ) -> torch.Tensor:
        """The hidden states at the last tokens of answers to a prompt, `[n, D]`."""
        states = self.hidden([(*prompt, *tokens) for tokens in answers])[depth]
        return torch.stack([of_answer[-1] for of_answer in states])

    def next_logits(self, prompt: Sequence[int], answers: list[Tokens]) -> torch.Tensor:
        """The logits of the next token of each answer, `[n, V]`."""
        with torch.inference_mode():
            return self._model.lm_head(self.last_hidden(prompt, answers))


def apply_head(layers: Sequence[dict[str, np.ndarray]], features: torch.Tensor) -> list[float]:
    """A head with SiLU between its layers: `kernel` `[inputs, outputs]` and `bias`."""
    for number, layer in enumerate(layers):
        if number:
            features = torch.nn.functional.silu(features)
        features = features @ torch.from_numpy(layer["kernel"])
        features = features + torch.from_numpy(layer["bias"])
    return features[:, 0].tolist()


def _once_each(function, sequences: list[Tokens]) -> list:
    """`function` of the sequences, of which it sees equal ones but once."""
    distinct = list(dict.fromkeys(sequences))
    results = dict(zip(distinct, function(distinct), strict=True))
    return [results[tokens] for tokens in sequences]
