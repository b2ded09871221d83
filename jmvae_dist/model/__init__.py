"""The Joint Multimodal VAE (Suzuki et al. 2016): networks, likelihoods, objective and inference."""

from jmvae_dist.model.jmvae import JMVAE, JMVAEOutput, LatentOutput
from jmvae_dist.model.networks import GaussianParams, Networks, build_networks

__all__ = ["JMVAE", "GaussianParams", "JMVAEOutput", "LatentOutput", "Networks", "build_networks"]
