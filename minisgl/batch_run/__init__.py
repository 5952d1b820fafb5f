"""The batch runner behind `minisgl run`: a file of prompts in, a file of answers out.

`rows` is the schema of both, `reader` and `writer` know files, `runner` drives an engine. None of them parses flags or
prints. Each row stands alone: what is wrong with one becomes its error row, and every other row is answered.
"""
