"""SSDD: spatial latents, decoded by one U-Net."""
