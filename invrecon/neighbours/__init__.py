"""Other libraries of the field, each at arm's length: theirs from ours, ours from theirs, imported when asked for."""

from invrecon.neighbours.deepinv import denoiser_to_deepinv, from_deepinv, to_deepinv

__all__ = ["denoiser_to_deepinv", "from_deepinv", "to_deepinv"]
