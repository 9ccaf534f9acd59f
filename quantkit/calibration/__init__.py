"""Quantization with data: text goes through the model a layer at a time, and each layer is rounded on what it sees."""
