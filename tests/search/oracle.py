"""The search in plain Python, written from its description and from nothing else.

Lists, tuples and loops; one prompt; no arrays but the noise. It shares no code with
`iro_jax.search`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sequence:
    tokens: tuple = ()
    ended: bool = False
    truncated: bool = False
    score: float = 0.0
    log_prob: float = 0.0
    birth: tuple = ()  # (step, row, slot) of the last chunk; what makes a node of the tree

    @property
    def finished(self):
        return self.ended or self.truncated


@dataclasses.dataclass
class Result:
    best: Sequence
    ranked: list
    beams: list
    num_tokens: int
    num_queries: int
    selections: list  # of every step, the candidate indices


def oracle_search(
    *, draw, score, width, successors, chunk_length, limit, select, values=1, reuse=False
):
    """`draw(step, row, slot, prefix, i) -> (token, log_prob, is_end)`; `score(tokens) -> float`."""
    beams = [Sequence() for _ in range(width)]
    pool, last_set = [], []
    num_tokens = num_queries = step = 0
    selections = []
    while not all(beam.finished for beam in beams):
        live = [k for k in range(width) if not beams[k].finished]
        turn = 0
        candidates = []  # (index, sequence, row)
        for row, beam in enumerate(beams):
            source = beam
            slots = range(successors)
            if beam.finished:
                candidates.append((row * successors, beam, row))
                if not reuse:
                    continue
                source = beams[live[turn % len(live)]]
                turn += 1
                slots = range(1, successors)
            for slot in slots:
                tokens, log_prob, ended = source.tokens, source.log_prob, False
                for i in range(chunk_length):
                    if ended or len(tokens) == limit:
                        break
                    token, token_log_prob, ended = draw(step, row, slot, tokens, i)
                    tokens = (*tokens, token)
                    log_prob += token_log_prob
                    num_tokens += 1
                new = Sequence(
                    tokens=tokens,
                    ended=ended,
                    truncated=not ended and len(tokens) == limit,
                    score=score(tokens),
                    log_prob=log_prob,
                    birth=(step, row, slot),
                )
                num_queries += values
                candidates.append((row * successors + slot, new, row))
        chosen = select(candidates, width)
        selections.append([index for index, _, _ in chosen])
        beams = [sequence for _, sequence, _ in chosen]
        for beam in beams:
            if beam.finished and beam.birth[0] == step and beam not in pool:
                pool.append(beam)
        pool.sort(key=lambda sequence: -sequence.score)
        del pool[width * successors :]
        last_set = [sequence for _, sequence, _ in candidates if sequence.finished]
        step += 1
    final = pool + [sequence for sequence in last_set if sequence not in pool]
    ranked = sorted(final, key=lambda sequence: -sequence.score)
    return Result(ranked[0], ranked, beams, num_tokens, num_queries, selections)


def by_score(candidates):
    return sorted(candidates, key=lambda entry: (-entry[1].score, entry[0]))


def best_k(candidates, width):
    return by_score(candidates)[:width]


def distinct_first(candidates, width):
    """Algorithm 5: walk by falling score, take unused groups; then walk again."""
    taken, used = [], set()
    for entry in by_score(candidates):
        if len(taken) < width and entry[1].tokens not in used:
            used.add(entry[1].tokens)
            taken.append(entry)
    for entry in by_score(candidates):
        if len(taken) < width and entry not in taken:
            taken.append(entry)
    return taken


def best_of_each_row(candidates, width):
    return [by_score([e for e in candidates if e[2] == row])[0] for row in range(width)]
