"""What a run says about itself: statistics over prompts, win rates and judges, health of value
functions, the cost ledger, and pictures."""

from iro_jax.evaluation.comparing import (
    best_of_n_divergence,
    distinct_n,
    expected_best,
    search_divergence,
    wins,
)
from iro_jax.evaluation.flops import (
    Reader,
    reward_cost,
    sample_cost,
    search_cost,
    trace_cost,
)
from iro_jax.evaluation.health import (
    Bin,
    Drift,
    Fit,
    Health,
    RewardGap,
    drift,
    errors_by_prompt,
    measure_health,
    reward_gap,
)
from iro_jax.evaluation.judging import (
    INSTRUCTION,
    TLDR,
    CallableJudge,
    ChatJudge,
    JudgeError,
    PairJudge,
    Template,
    Verdicts,
)
from iro_jax.evaluation.ledger import Cost, Entry, Ledger, LedgerError
from iro_jax.evaluation.length_control import (
    GamedBaselines,
    JudgedAnswer,
    LengthModel,
    fit_length_model,
    length_controlled_win_rate,
    standardised_lengths,
    win_rate,
)
from iro_jax.evaluation.plots import save_health_plots
from iro_jax.evaluation.statistics import (
    Interval,
    bootstrap,
    closes,
    gap_closed,
    markdown_table,
    paired,
)
from iro_jax.models.flops import decode_flops, forward_flops

__all__ = [
    "INSTRUCTION",
    "TLDR",
    "Bin",
    "CallableJudge",
    "ChatJudge",
    "Cost",
    "Drift",
    "Entry",
    "Fit",
    "GamedBaselines",
    "Health",
    "Interval",
    "JudgeError",
    "JudgedAnswer",
    "Ledger",
    "LedgerError",
    "LengthModel",
    "PairJudge",
    "Reader",
    "RewardGap",
    "Template",
    "Verdicts",
    "best_of_n_divergence",
    "bootstrap",
    "closes",
    "decode_flops",
    "distinct_n",
    "drift",
    "errors_by_prompt",
    "expected_best",
    "fit_length_model",
    "forward_flops",
    "gap_closed",
    "length_controlled_win_rate",
    "markdown_table",
    "measure_health",
    "paired",
    "reward_cost",
    "reward_gap",
    "sample_cost",
    "save_health_plots",
    "search_cost",
    "search_divergence",
    "standardised_lengths",
    "trace_cost",
    "win_rate",
    "wins",
]
