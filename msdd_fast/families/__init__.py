"""The families of tokenizers, one folder each."""
