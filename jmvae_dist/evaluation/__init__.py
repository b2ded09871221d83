"""Evaluation of a model on held-out data: likelihoods, coherence across modalities, figures."""

from jmvae_dist.evaluation.evaluate import EvaluationSums, evaluate_batches, evaluation_mode, finalize

__all__ = ["EvaluationSums", "evaluate_batches", "evaluation_mode", "finalize"]
