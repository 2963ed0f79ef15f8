"""Terms of the report besides arms and metrics, with their definitions."""

from __future__ import annotations

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("anchor", "One fixed instruction text on every task row, never on a general row."),
    (
        "95 % interval",
        "Where the value would lie in 95 of 100 repetitions with other test rows of the same kind. It covers the "
        "choice of test rows, not the choice of training rows or seed.",
    ),
    (
        "difference",
        "tell minus the other arm on the same test rows, so its interval is narrower than the two arms' intervals "
        "suggest. If the interval contains 0, the difference is not significant.",
    ),
    ("general rows", "Instructions and answers that have nothing to do with the task."),
    ("step", "One update of the weights, from one batch of rows."),
    ("trained tokens", "Tokens that carry loss: the answers with their end token, not the prompts."),
    ("ratio", "General tokens for each token of task data, task rows counted once."),
    ("FLOPs", "Floating-point operations spent in training, a measure of compute that does not depend on the machine."),
)
