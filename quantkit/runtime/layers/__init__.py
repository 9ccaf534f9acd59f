"""The modules that a decoder is made of. They hold their weights as stored and get all other state as arguments."""
