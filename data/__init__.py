"""Data: tokenizers, the chat format, reading, writing, and one folder per data set with its prepare.py."""
