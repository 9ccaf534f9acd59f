"""What a decoder is made of. Layers hold their weights as stored and get all other state as arguments.

They are plain callables, not modules of torch.nn: nobody trains them, and each call and attribute of a module takes
Python 5 us, a tenth of what a model of 135M parameters takes for a token on a CPU.
"""
