"""What a session with a lent GPU needs."""
