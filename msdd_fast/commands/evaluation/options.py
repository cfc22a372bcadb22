"""Words of the command line. Does not import PyTorch, so that help is fast."""

CROPS = ("center", "adm", "none")
PIXELS = ("float", "uint8")
RESIZES = ("bicubic", "bilinear", "lanczos", "box")
"""The names of ``io.images.RESIZE_FILTERS``."""
SSIMS = ("ssim", "ssim_authors")
"""Those of ``metrics.image.SSIM_DATA_RANGES``."""
