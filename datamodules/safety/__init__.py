"""Answers of models to people and pictures, with labels of harm.

`catalog`: facts of the sets, known without loading them. `pictures`: decoding with limits. `readers`: files in their
publishers' own layouts. `shapes`: made samples whose labels can be seen. `module`: `SafetyDataModule`.
"""
