"""Sessions of clicks.

`catalog`: facts of the sets, known without loading them. `sources`: where each is looked for. `readers`: logs in their
publishers' own columns. `clicks`: from a log to training and test sessions. `planted`: sessions with known intents.
`module`: `SessionDataModule`.
"""
