"""How many tokens to train on: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (Chinchilla)."""

TOKENS_PER_PARAMETER = 20.0  # their table 3 has 20.0 to 22.4, from 0.4 to 10,000 billion parameters

# Their parametric loss, E + A / N^alpha + B / D^beta, with the constants that Besiroglu et al. 2024 ("Chinchilla
# Scaling: A replication attempt") fitted to the same data. Hoffmann's own rounded ones (406.4, 410.7, 0.34, 0.28)
# contradict their other two methods: at 70 billion parameters they ask for 109 tokens each, these for 18.
A, B, ALPHA, BETA = 482.01, 2085.43, 0.3478, 0.3658


def optimal_tokens(parameters: float) -> float:
    """Tokens at which a model of that many parameters is the best use of the compute: 20 each."""
    return TOKENS_PER_PARAMETER * _positive(parameters)


def fitted_tokens(parameters: float) -> float:
    """The same by the fitted loss: the D for which N = `parameters` minimises the loss at a compute of 6 N D.

    On the line of equal compute N dL/dN = D dL/dD, so alpha A / N^alpha = beta B / D^beta.
    """
    return (BETA * B / (ALPHA * A) * _positive(parameters) ** ALPHA) ** (1 / BETA)


def _positive(parameters: float) -> float:
    if not parameters > 0:
        raise ValueError(f"parameters is {parameters}; expected more than 0")
    return parameters
