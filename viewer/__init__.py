"""A page that shows what every head of a model looks at, while the model reads and writes: python -m viewer."""
