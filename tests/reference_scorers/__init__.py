"""Plain scripts that compute what the frontends must give, written from the description of the paper's code.

They do not use guda_fast, and are as slow as such scripts are: the oracle of the frontends' tests, and the rival of
their benchmark.
"""
