"""Matrix products: dense, int8, float8."""
