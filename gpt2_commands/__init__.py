"""The commands `gpt2 ...`, a module each. `__main__` has the table of them; the files in `scripts` call the same."""
