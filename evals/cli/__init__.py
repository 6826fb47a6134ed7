"""The command line ``headq``: calibrate, estimate, doctor, eval, compare, chat. Each command is a module here.

What a command needs (torch, transformers) is imported when it runs, so that ``headq --help`` answers at once.
"""
