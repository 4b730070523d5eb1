"""Drop-in commands for the public scripts of the GUDA paper: their options, their files, the engine's speed."""
