"""What `msdd-fast eval` and `msdd-fast table` are made of."""
