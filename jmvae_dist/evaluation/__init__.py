"""Evaluation of a model on held-out data: likelihoods, coherence across modalities, figures."""

from jmvae_dist.evaluation.evaluate import (
    evaluate_batches,
    evaluate_prior,
    evaluation_mode,
    results_of,
    standard_metrics,
)

__all__ = ["evaluate_batches", "evaluate_prior", "evaluation_mode", "results_of", "standard_metrics"]
