"""MSDD: token latents, decoded over several scales."""
