"""Device code of the kernels, their tiles and the order in which they run: of no framework.

Triton is imported by what needs it (load_triton.py), not here: Pallas reads tiles without it.
"""
