"""Data: sharded storage, the order of samples as a pure function of the global step, and loaders.

Modules are imported by name (`jmvae_dist.data.manifest`, `.plan`, `.reader`, `.loader`, `.writer`), so that
those which need only numpy do not import torch.
"""
