"""What a run would cost, before it runs: parameters, FLOPs, memory and communication.

It compiles programs and does not run them. It allocates no arrays and reads no images.
"""
