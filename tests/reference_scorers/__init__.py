"""Plain scripts that compute what the frontends must give: written from the description of the paper's code, without
guda_fast, and as slow as such scripts are. They are the oracle of the frontends' tests and the rival of their benchmark.
"""
