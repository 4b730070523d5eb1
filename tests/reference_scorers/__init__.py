"""Plain scripts of what the public scorers of the paper do, written for these tests and without guda_fast.

They are as slow as such scripts are: the oracle of the frontends' tests, and the rival of their benchmark.
"""
