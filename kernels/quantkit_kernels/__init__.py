"""Matrix multiplications over quantized weights. Imports torch only, so that it can become its own package."""
