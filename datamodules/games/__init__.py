"""Games.

`module`: `GameDataModule`, training batches from a replay memory and evaluation episodes. `play`: decisions in several
games at once. `replay`: the memory, in files. `atari`: wrappers and scores of Atari games. `catch`, `boards`: games of
the suite's own and their scores.
"""
