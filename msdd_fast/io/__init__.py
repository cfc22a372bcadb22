"""Files in and out: images, latents, weights."""
