"""Standard model code: eager, trainable, readable."""
