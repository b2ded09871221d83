"""Numerical building blocks: Gaussian KL terms, products of experts, keyed noise."""
