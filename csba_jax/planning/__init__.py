"""What a run would cost, before it runs: parameters, FLOPs, memory, and what devices would send.

It compiles and never allocates. It reads no data.
"""
