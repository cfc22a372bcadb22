"""PiD: latents of image generators to images of 2 to 4 thousand pixels, by a pixel-space transformer."""
